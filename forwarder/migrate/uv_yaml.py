"""rinetd-uv's YAML to a draft. Needs PyYAML, which is not installed with the forwarder.

Every value is a text to rinetd-uv, whatever YAML would make of it; so it is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import yaml

from forwarder.config.address import Address, AddressError, parse_host, parse_port, parse_unix
from forwarder.config.model import AccessRule, LogFormat, LogPlace, Protocol, Upstream, Verdict
from forwarder.config.raw import Placed, RawRule
from forwarder.errors import Place
from forwarder.migrate import uv_balance, uv_names, uv_words
from forwarder.migrate.yaml_nodes import NodeReader, last_line, written

if TYPE_CHECKING:
    from collections.abc import Callable

    from forwarder.config.address import Endpoint
    from forwarder.config.raw import RawKeys
    from forwarder.migrate.draft import Draft

_TRUE: Final = frozenset({"true", "yes", "on", "1"})
_FALSE: Final = frozenset({"false", "no", "off", "0"})
_ADDRESS_FORMS: Final = "HOST:PORT, HOST:PORT/udp, unix:/PATH or unix:@NAME"
_RULE_KEYS: Final = frozenset(
    {
        "access",
        "bind",
        "connect",
        "connect_timeout",
        "keepalive",
        "load_balancing",
        "mode",
        "name",
        "timeout",
    }
)


def read(text: str, source: str, service_port: Callable[[str, str], int]) -> Draft:
    """Read a whole file. Problems are in the draft."""
    reader = _UvReader(source, service_port)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        reader.read_remarks(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = Place(source, mark.line + 1, mark.column + 1) if mark else Place(source)
        reader.draft.raw.rules_seen = 1
        problem = getattr(error, "problem", None) or "nested too deep"
        reader.draft.issues.error(place, f"not valid YAML: {problem}")
        return reader.draft
    reader.read_root(root)
    uv_words.finish(reader.draft, Place(source), reader.flows, reader.names)
    return reader.draft


class _UvReader(NodeReader):
    """Walks the nodes of a document."""

    def __init__(self, source: str, service_port: Callable[[str, str], int]) -> None:
        super().__init__(source)
        self.flows: Placed[int] | None = None
        self.names = uv_names.Names(expands=True)
        self._service_port = service_port

    # -- the document

    def read_root(self, root: yaml.Node | None) -> None:
        """Read everything; global settings first, wherever they stand."""
        found = {key: (place, node) for key, place, node in self.pairs(root, "the document")}
        if "global" in found:
            self._read_global(found.pop("global")[1])
        if "rules" in found:
            for node in self.items(found.pop("rules")[1]):
                self._read_rule(node)
        for key, (place, _) in found.items():
            self.draft.leave_out(place, key, uv_words.UNKNOWN)

    def _read_global(self, node: yaml.Node) -> None:
        is_common = False
        log: Placed[str] | None = None
        for key, place, value in self.pairs(node, "global"):
            if key == "access":
                self.draft.raw.access += self._access(value)
            elif key in uv_words.YAML_GLOBAL_GAPS:
                why = uv_words.YAML_GLOBAL_GAPS[key]
                self.draft.leave_out(place, f"{key}: {written(value)}", why)
            elif (text := self.text(value, key)) is None:
                continue
            elif key == "log_file":
                log = Placed(text, place)
            elif key == "log_common":
                self.draft.settings["log_format"] = place
                is_common = text.lower() in _TRUE
            else:
                self._read_setting(key, text, place)
        if log:
            how = LogFormat.COMMON if is_common else LogFormat.RINETD
            self.draft.set_log(LogPlace(to=log.value, format=how, place=log.place))

    def _read_setting(self, key: str, text: str, place: Place) -> None:
        draft = self.draft
        if key == "pid_file":
            draft.set_pid_file(text, place)
        elif key == "connect_timeout":
            found = uv_words.seconds(draft, key, text, place)
            if found:
                draft.raw.defaults[key] = found
                draft.settings[key] = place
        elif key == "max_udp_connections":
            self.flows = uv_words.flows(draft, key, text, place)
        elif key == "listen_backlog":
            uv_words.backlog(draft, key, text, place)
        elif key == "dns_multi_ip_expand":
            is_on = text.lower() not in _FALSE
            self.names.set_expands(f"{key}: {text}", place, is_on=is_on)
        elif key == "dns_multi_ip_proto":
            self.names.set_family(draft, text, f"{key}: {text}", place)
        else:
            draft.leave_out(place, f"{key}: {text}", uv_words.UNKNOWN)

    def _access(self, node: yaml.Node) -> list[AccessRule]:
        rules = []
        for key, place, value in self.pairs(node, "access"):
            if key not in {"allow", "deny"}:
                self.draft.leave_out(place, key, uv_words.UNKNOWN)
                continue
            for item in self.items(value):
                pattern = self.text(item, key)
                if pattern is not None:
                    verdict = Verdict(key)
                    at = self.place(item)
                    rules.append(AccessRule(verdict=verdict, pattern=pattern, place=at))
        return rules

    # -- a rule

    def _read_rule(self, node: yaml.Node) -> None:
        """Read one rule; it becomes as many as it has addresses to listen on."""
        raw = self.draft.raw
        raw.rules_seen += 1
        keys = {key: (place, value) for key, place, value in self.pairs(node, "a rule")}
        start = self.place(node)
        self.draft.ends[start.line] = last_line(node)
        binds = self._listens(keys, start)
        upstreams, source, kind = self._upstreams(keys, start)
        access = self._access(keys["access"][1]) if "access" in keys else []
        is_alone = len(upstreams) == 1 and not self.names.stands_for_several(upstreams)
        balance = self._balance(keys, is_alone=is_alone)
        uv_balance.report_weights(self.draft, upstreams, balance)
        self._note_gaps(keys)
        if not binds or not upstreams:
            raw.dropped_access += access
            return
        if "name" not in keys:
            self.draft.issues.error(start, "the rule has no name", allowed="name: NAME")
        for index, (listen, listen_kind) in enumerate(binds):
            rule = RawRule(
                place=start,
                listen=listen,
                upstreams=upstreams,
                protocol=Protocol.UDP if listen_kind == "udp" else Protocol.TCP,
                name=self._name(keys, index),
                keys=dict(balance),
                access=list(access),
            )
            rule.put("source_address", source)
            self._apply(rule, keys)
            uv_words.finish_rule(self.draft, rule, kind, upstreams[0].place)

    def _name(self, keys: dict[str, tuple[Place, yaml.Node]], index: int) -> Placed[str] | None:
        if "name" not in keys:
            return None
        place, node = keys["name"]
        name = self.text(node, "name")
        return Placed(f"{name} {index + 1}" if index else name, place) if name else None

    def _listens(
        self, keys: dict[str, tuple[Place, yaml.Node]], start: Place
    ) -> list[tuple[Placed[Endpoint], str]]:
        if "bind" not in keys:
            self.draft.issues.error(start, "the rule has no bind", allowed="an address, or several")
            return []
        found = [self._address(item) for item in self.items(keys["bind"][1])]
        listens = [listen for listen in found if listen]
        if len(listens) > 1:
            what = f"the rule listens on {len(listens)} addresses and becomes as many rules"
            self.draft.differ(keys["bind"][0], what)
        return listens

    def _upstreams(
        self, keys: dict[str, tuple[Place, yaml.Node]], start: Place
    ) -> tuple[tuple[Placed[Upstream], ...], Placed[str] | None, str]:
        """Upstreams, the source address that they share, and the transport of the first one."""
        if "connect" not in keys:
            self.draft.issues.error(start, "the rule has no connect", allowed="an upstream")
            return (), None, ""
        found: list[tuple[Placed[Upstream], str]] = []
        sources: list[Placed[str] | None] = []
        for item in self.items(keys["connect"][1]):
            weight, source = 1, None
            if isinstance(item, yaml.MappingNode):
                address, source, weight = self._upstream(item)
            else:
                address = self._address(item)
            if address:
                end, kind = address
                found.append((Placed(Upstream(end.value, weight), end.place), kind))
                sources.append(source)
        if not found:
            return (), None, ""
        upstreams = uv_balance.joined(self.draft, [upstream for upstream, _ in found])
        return upstreams, self._source_of(sources), found[0][1]

    def _upstream(
        self, node: yaml.Node
    ) -> tuple[tuple[Placed[Endpoint], str] | None, Placed[str] | None, int]:
        """The address, its transport, the source address and the weight of one upstream."""
        address, source, weight = None, None, 1
        for key, place, value in self.pairs(node, "an upstream"):
            if key == "dest":
                address = self._address(value)
            elif key == "src":
                text = self.text(value, key)
                source = Placed(text.strip("[]"), place) if text else None
            elif key == "weight":
                most = uv_balance.MOST_WEIGHT
                text = self.text(value, key) or ""
                weight = uv_words.whole(self.draft, key, text, place, 1, most) or 1
            else:
                why = uv_words.YAML_UPSTREAM_GAPS.get(key, uv_words.UNKNOWN)
                self.draft.leave_out(place, f"{key}: {written(value)}", why, in_rule=True)
        if address is None:
            self.bad(node, "an upstream without dest", 'dest: "HOST:PORT"')
        return address, source, weight

    def _source_of(self, sources: list[Placed[str] | None]) -> Placed[str] | None:
        """The one source address of all upstreams; several are an error."""
        given = [source for source in sources if source]
        if len({source.value if source else "" for source in sources}) <= 1:
            return given[0] if given else None
        for source in given:
            self.draft.issues.error(
                source.place,
                f"src {source.value} is not that of the other upstreams of the rule",
                allowed="one source address for a rule",
                hint="give the upstream a rule of its own",
            )
        return None

    def _address(self, node: yaml.Node) -> tuple[Placed[Endpoint], str] | None:
        """Read ``HOST:PORT/PROTOCOL`` or a unix socket; with its transport."""
        text = self.text(node, "an address")
        if text is None:
            return None
        if text.startswith("unix:"):
            try:
                return Placed(parse_unix(text.removeprefix("unix:")), self.place(node)), ""
            except AddressError as error:
                self.bad(node, str(error), _ADDRESS_FORMS)
                return None
        joint, _, kind = text.partition("/")
        host, _, port = joint.rpartition(":")
        kind = kind.lower() or "tcp"
        if kind not in {"tcp", "udp"} or not host:
            self.bad(node, f"{text!r} is not an address", _ADDRESS_FORMS)
            return None
        try:
            if port[:1].isalpha():
                port = str(self._service_port(port, kind))
            return Placed(Address(parse_host(host), parse_port(port)), self.place(node)), kind
        except AddressError as error:
            self.bad(node, str(error), _ADDRESS_FORMS)
        except OSError:
            self.bad(node, f"{port!r} is not a known {kind} service", _ADDRESS_FORMS)
        return None

    def _balance(self, keys: dict[str, tuple[Place, yaml.Node]], *, is_alone: bool) -> RawKeys:
        """How sessions are spread."""
        if "load_balancing" not in keys:
            return {}
        words = [
            (word, place, text)
            for word, place, node in self.pairs(keys["load_balancing"][1], "load_balancing")
            if (text := self.text(node, word)) is not None
        ]
        return uv_balance.read(self.draft, words, is_alone=is_alone)

    def _note_gaps(self, keys: dict[str, tuple[Place, yaml.Node]]) -> None:
        """Note what a rule has without an equivalent here."""
        for key, (place, _) in keys.items():
            if key not in _RULE_KEYS:
                self.draft.leave_out(place, key, uv_words.UNKNOWN, in_rule=True)

    def _apply(self, rule: RawRule, keys: dict[str, tuple[Place, yaml.Node]]) -> None:
        draft = self.draft
        for key, (place, node) in keys.items():
            if key not in {"timeout", "connect_timeout", "keepalive", "mode"}:
                continue
            text = self.text(node, key)
            if text is None:
                continue
            if key == "timeout":
                rule.put(key, uv_words.seconds(draft, key, text, place, least=1))
            elif key == "connect_timeout":
                found = uv_words.seconds(draft, key, text, place)
                rule.put(key, found if found and found.value else None)
            elif key == "keepalive":
                is_on = text.lower() not in _FALSE
                uv_words.keepalive(draft, rule, f"keepalive: {text}", place, is_on=is_on)
            else:
                rule.put(key, uv_words.mode(draft, text, place, rule.listen.value))
