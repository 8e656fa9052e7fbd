"""Gives existing listening sockets the options of their rule. Binds and owns nothing."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import TYPE_CHECKING

from forwarder.config.model import BACKLOG
from forwarder.net import options as socket_options
from forwarder.net import sockets, udp
from forwarder.net.options import Template
from forwarder.net.sockets import LentSocket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forwarder.config.model import SocketOptions


def prepare_inherited(sock: socket.socket, host: str, options: SocketOptions) -> None:
    """Set up a socket that another process has bound to ``host``. Raises OSError.

    A predecessor may have had other options; to those of a service manager we only add.
    """
    is_lent = isinstance(sock, LentSocket)
    names = socket_options.asked_for(options) if is_lent else socket_options.all_names()
    if sock.type == socket.SOCK_DGRAM:
        udp.prepare_listener(sock, host)
        names += ("rcvbuf_bytes", "sndbuf_bytes")
    else:
        sockets.prepare_listener(sock)
        if not is_lent or options.backlog != BACKLOG:
            sock.listen(options.backlog)
    if sock.family != socket.AF_UNIX:
        with _template(sock, options) as template:
            template.put_on(sock, names)


def change_options(
    listeners: Sequence[socket.socket], old: SocketOptions, new: SocketOptions
) -> None:
    """Change what differs, on sockets of one address; clients accepted from now on have it.

    listen(2) on a socket that listens changes its backlog and keeps its queue. Raises OSError; then
    some may have been changed, and the caller changes them back.
    """
    names = socket_options.changed(old, new)
    if listeners and listeners[0].family != socket.AF_UNIX:
        with _template(listeners[0], new) as template:
            for sock in listeners:
                template.put_on(sock, names)
    for sock in listeners if "backlog" in names else ():
        if sock.type == socket.SOCK_STREAM:
            sock.listen(new.backlog)


def _template(sock: socket.socket, options: SocketOptions) -> closing[Template]:
    return closing(Template(sock, options, buffer_bytes=udp.BUFFER_BYTES))
