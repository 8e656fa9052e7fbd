"""Walking the nodes of a YAML document: values and comments with their places, or an issue.

Knows kinds of nodes, not what the keys mean. Needs PyYAML.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import yaml

from forwarder.errors import Place
from forwarder.migrate.draft import Draft, Remark

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMMENT: Final = re.compile(r"(?:^|(?<=[ \t]))#.*", re.MULTILINE)


class NodeReader:
    """Reads into ``draft`` the document that ``source`` names."""

    def __init__(self, source: str) -> None:
        self.draft = Draft()
        self._source = source

    def place(self, node: yaml.Node) -> Place:
        return Place(self._source, node.start_mark.line + 1, node.start_mark.column + 1)

    def bad(self, node: yaml.Node, what: str, allowed: str) -> None:
        self.draft.issues.error(self.place(node), what, allowed=allowed)

    def pairs(self, node: yaml.Node | None, what: str) -> Iterator[tuple[str, Place, yaml.Node]]:
        """Keys of a mapping with their places and values."""
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield str(key.value), self.place(key), value
        elif node is not None:
            self.bad(node, f"{what} is not a mapping", "KEY: VALUE lines")

    def items(self, node: yaml.Node) -> list[yaml.Node]:
        """Elements of a list; anything else is a list of one."""
        return list(node.value) if isinstance(node, yaml.SequenceNode) else [node]

    def text(self, node: yaml.Node, what: str) -> str | None:
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        self.bad(node, f"{what} is not a single value", "a text or a number")
        return None

    def read_remarks(self, text: str) -> None:
        """Note the comments: what begins with # and is in no value."""
        spans = [
            (token.start_mark.index, token.end_mark.index)
            for token in yaml.scan(text, Loader=yaml.SafeLoader)
            if isinstance(token, yaml.ScalarToken)
        ]
        spans.reverse()
        line, seen = 1, 0
        for match in _COMMENT.finditer(text):
            while spans and spans[-1][1] <= match.start():
                spans.pop()
            if spans and spans[-1][0] <= match.start():
                continue
            line, seen = line + text.count("\n", seen, match.start()), match.start()
            self.draft.remarks.append(Remark(Place(self._source, line), match[0].rstrip()))


def written(node: yaml.Node) -> str:
    """A value in short, for the report."""
    return str(node.value) if isinstance(node, yaml.ScalarNode) else "..."


def last_line(node: yaml.Node) -> int:
    """The line of the last value in a node; its own mark is behind the comments that follow."""
    last: int = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        return max(last, node.end_mark.line + 1)
    stack = [node]
    while stack:
        found = stack.pop()
        if isinstance(found, yaml.MappingNode):
            stack += [part for pair in found.value for part in pair]
        elif isinstance(found, yaml.SequenceNode):
            stack += found.value
        last = max(last, found.start_mark.line + 1)
    return last
