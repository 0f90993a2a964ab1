"""Code blocks of the documentation that say, in a comment above them, how they are to be run."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"(?:<!-- run: (.*?) -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code; ``how`` is what the comment says."""

    name: str
    code: str
    how: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


def blocks(document: str, language: str) -> Iterator[Block]:
    """Yield a document's blocks of a language. Each must say how it is run."""
    text = (DOCS / document).read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        if found[2] == language:
            line = text.count("\n", 0, found.start(3))
            assert found[1], f"{document}:{line}: no comment says how to run this"
            yield Block(f"{document}:{line}", found[3], tuple(shlex.split(found[1])))
