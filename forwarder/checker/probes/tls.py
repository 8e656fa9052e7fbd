"""Checks of kind ``tls``: a handshake, and what is said and heard after it."""

from __future__ import annotations

import ssl
import time
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from forwarder.checker.probes import certificate, why
from forwarder.checker.probes.expecting import Expecting
from forwarder.checker.probes.names import name_for_tls
from forwarder.checker.probes.readers import MOST_BYTES
from forwarder.checker.probes.stream import Asking

if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import SocketType

    from forwarder.checker.loop import Loop
    from forwarder.checker.outcome import Aim, Outcome, Probe
    from forwarder.config.model import Check

# What a server may send in all, records and handshake; a chain of certificates has some kilobytes.
# It bounds the work that a server can make for the checker. Arbitrary.
_MOST_RAW_BYTES: Final = 512 * 1024
# The system's list of authorities is read again this often: it is updated under a running process.
_FRESH_S: Final = 3600.0
# A check asks whether a server speaks TLS, and not whether it does that well.
_ANY_CIPHER: Final = "DEFAULT:@SECLEVEL=0"
# The first byte of all records that a server may begin with: an alert, a handshake (RFC 8446 5.1).
_RECORDS: Final = frozenset({0x15, 0x16})


def begin(check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> Probe:
    """See :class:`~forwarder.checker.outcome.Begin`. Reads the system's authorities, if need be."""
    return AskingByTls(check, aim, loop, done)


@lru_cache(maxsize=4)
def context(hour: int, *, is_verified: bool) -> ssl.SSLContext:
    """What connections have in common. Another ``hour`` reads the authorities again."""
    del hour
    made = ssl.create_default_context() if is_verified else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # A server that asks for one handshake after the other would keep the checker busy.
    made.options |= ssl.OP_NO_RENEGOTIATION
    if not is_verified:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
        made.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        made.set_ciphers(_ANY_CIPHER)
    return made


class AskingByTls(Asking):
    """The conversation on a TLS connection. All that passes goes through two buffers of OpenSSL."""

    __slots__ = (
        "_check",
        "_first",
        "_has_shaken_hands",
        "_incoming",
        "_outgoing",
        "_raw_bytes",
        "_tls",
    )

    def __init__(self, check: Check, aim: Aim, loop: Loop, done: Callable[[Outcome], None]) -> None:
        """See :class:`~forwarder.checker.outcome.Begin`."""
        self._check = check
        self._has_shaken_hands = False
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        self._first = b""
        self._raw_bytes = 0
        super().__init__(check, aim, loop, done, b"", Expecting(check))

    def on_connected(self, sock: SocketType) -> None:
        """See :class:`Connecting`."""
        super().on_connected(sock)
        hour = int(self._loop.now // _FRESH_S)
        name = name_for_tls(self._check, self._aim)
        try:
            self._tls = context(hour, is_verified=self._check.is_verified).wrap_bio(
                self._incoming,
                self._outgoing,
                server_hostname=name and name.encode(),
            )
        except (OSError, ValueError) as err:  # no authorities; a name that TLS cannot say
            self.end(f"cannot ask by TLS: {why.of_error(str(err))}", is_ours=True)
            return
        self._advance(sock, self._tls)

    def hear(self, data: bytes) -> None:
        """See :class:`Asking`: these are records."""
        sock, tls = self._sock, self._tls
        if sock is None or tls is None:
            return
        self._first = self._first or data[: why.MOST_SHOWN]
        self._raw_bytes += len(data)
        if self._raw_bytes > _MOST_RAW_BYTES:
            self.end(f"sent more than {_MOST_RAW_BYTES >> 10} KiB")
            return
        self._incoming.write(data)
        self._advance(sock, tls)

    def _advance(self, sock: SocketType, tls: ssl.SSLObject) -> None:
        """Go on as far as there is something to go on with."""
        try:
            if not self._has_shaken_hands:
                tls.do_handshake()
                self._has_shaken_hands = True
                self.remark = certificate.remark(tls.getpeercert(binary_form=True), time.time())
                if not (self._check.send or self._check.expect):
                    self.end(self.remark, is_good=True)
                    return
                if self._check.send:
                    tls.write(self._check.send)
            while data := tls.read(MOST_BYTES):
                super().hear(data)
                if self._sock is None:
                    return
            self.break_off("closed")
        except ssl.SSLWantReadError:
            self._flush(sock)
        except ssl.SSLError as err:
            self.end(self._why(err))

    def _flush(self, sock: SocketType) -> None:
        """Send what OpenSSL has for the server."""
        if self._outgoing.pending:
            self._unsent = memoryview(bytes(self._unsent) + self._outgoing.read())
            self.send(sock)

    def _why(self, err: ssl.SSLError) -> str:
        if self._first and self._first[0] not in _RECORDS:
            return f"no TLS: {why.got(self._first)}"
        if isinstance(err, ssl.SSLCertVerificationError):
            return f"tls: {why.of_error(err.verify_message).rstrip('.')}"
        return f"tls: {(err.reason or 'error').lower().replace('_', ' ')}"

    def close(self, *, is_orderly: bool) -> None:
        """See :class:`Attempt`: the last words of TLS, too, as far as the server takes them."""
        sock, tls = self._sock, self._tls
        if is_orderly and sock is not None and tls is not None:
            with suppress(ssl.SSLError):  # it would wait for those of the server
                tls.unwrap()
            self._flush(sock)
        super().close(is_orderly=is_orderly)

    def break_off(self, how: str) -> None:
        """See :class:`Asking`."""
        if self._tls is None or self._has_shaken_hands:
            super().break_off(how)
        else:
            self.end(f"{how} in the handshake of TLS")

    def on_silence(self) -> None:
        """See :class:`Attempt`."""
        if self._tls is None or self._has_shaken_hands:
            super().on_silence()
        else:
            self.end(f"no handshake of TLS {why.within(self._timeout_s)}")
