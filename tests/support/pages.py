"""Code blocks of the documentation.

The words behind the three backticks are the language and, if it is a file, its name; ``sh`` is
commands to type, ``sh old`` commands of another program, ``text`` neither, ``mermaid`` a picture.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
# What stands in a page is put below a directory of the test.
_PLACES: Final = ("/etc/", "/var/log/", "/run/forwarder")
_BLOCK: Final = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One code block; ``line`` is that of its first line of text."""

    page: Path
    line: int
    language: str
    name: str
    text: str

    def placed(self, root: Path) -> str:
        """The text, with the places of the system below ``root``."""
        return placed(self.text, root)

    def write(self, root: Path) -> Path:
        """Write it as the file that it is, below ``root``, and give the path."""
        path = Path(placed(self.name, root))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.placed(root))
        return path


def placed(text: str, root: Path) -> str:
    """A text with the places of the system below ``root``."""
    for place in _PLACES:
        text = re.sub(rf"(?<![\w/]){re.escape(place)}", f"{root}{place}", text)
    return text


def blocks(page: Path) -> list[Block]:
    """Every code block of a page, in order."""
    source = page.read_text()
    found = []
    for match in _BLOCK.finditer(source):
        language, _, name = match["info"].strip().partition(" ")
        line = source.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, line, language, name.strip(), textwrap.dedent(match["text"])))
    return found


def pages() -> list[Path]:
    """The pages that tell a user what to do; decisions are not among them."""
    guides = [path for path in DOCS.rglob("*.md") if path.parent.name != "adr"]
    return [ROOT / "README.md", *sorted(guides)]


def file_block(page: Path, name: str) -> Block:
    """The first block that is the file ``name``."""
    return next(block for block in blocks(page) if block.name == name)


def commands(block: Block) -> list[str]:
    """The commands of a block, one a line; comments and continued lines are as in a shell."""
    text = block.text.replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line]
