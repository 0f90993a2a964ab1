"""Code blocks of the documentation, and who runs them.

A comment above a block says how: ``<!-- run: KIND … -->``, or ``<!-- check: KIND … -->`` where less
is done with it than to run it. The kind is the first word, up to any "=". A test module takes all
blocks of a kind, in whatever documents, with ``runs("kind")`` or ``checks("kind")`` at its top
level; tests/unit/test_docs_ledger.py sees that none is left over. A fence without a language is
output or a drawing.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPO = Path(__file__).parents[1]
DOCS = REPO / "docs"
PLACES = ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/*.md", "tests/local_modal/*.md")
# What the documents write for the ids that they use in examples.
USER = "6f1c2a9e-0000-4000-8000-000000000001"
JOB = "0b9e4a51-2f0c-4c39-9f6d-1f8a4f1d2c33"
SHORT: Mapping[str, str] = {"6f1c…": USER, "0b9e…": JOB}

_BLOCK = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<verb>run|check): (?P<how>.*?) -->\n *)?"
    r"```(?P<language>[^\n]*)\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)
_COMMENT = re.compile(r"^ *<!-- (?:run|check)\b", re.MULTILINE)
_FENCE = re.compile(r"^ *```", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A block of code. ``kind`` is the verb and the kind, ``how`` all that the comment says."""

    document: str
    line: int
    language: str
    code: str
    verb: str
    how: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def kind(self) -> str:
        return self.how[0].partition("=")[0] if self.how else ""

    @property
    def options(self) -> dict[str, str]:
        """What the comment says after the kind, or with it, as ``name=value``."""
        return dict(word.split("=", 1) for word in self.how if "=" in word)

    def __str__(self) -> str:
        return self.name


def documents() -> list[Path]:
    """Return all documents, without what tools have installed below."""
    return sorted({path for place in PLACES for path in REPO.glob(place)})


def parse(document: str, text: str) -> Iterator[Block]:
    """Yield the blocks of a text. Raises ValueError for comments and fences that belong to none."""
    comments = fences = 0
    for found in _BLOCK.finditer(text):
        verb, how = found["verb"] or "", found["how"] or ""
        comments += bool(verb)
        fences += 2
        line = text.count("\n", 0, found.start("code"))
        indent = len(found["indent"])
        code = "".join(text[indent:] for text in found["code"].splitlines(keepends=True))
        yield Block(document, line, found["language"], code, verb, tuple(shlex.split(how)))
    if comments != len(_COMMENT.findall(text)):
        raise ValueError(f"{document}: a comment has no block below it")
    if fences != len(_FENCE.findall(text)):
        raise ValueError(f"{document}: a fence is not closed, or not found")


@cache
def every() -> tuple[Block, ...]:
    """Return the blocks of all documents."""
    return tuple(
        block
        for path in documents()
        for block in parse(path.relative_to(REPO).as_posix(), path.read_text(encoding="utf-8"))
    )


def runs(kind: str) -> list[Block]:
    """Return the blocks that the caller runs, and nobody else."""
    return [block for block in every() if (block.verb, block.kind) == ("run", kind)]


def checks(kind: str) -> list[Block]:
    """Return the blocks that the caller checks as well as it can without running them."""
    return [block for block in every() if (block.verb, block.kind) == ("check", kind)]


def in_full(code: str) -> str:
    """Return code with the ids that the documents shorten."""
    for short, full in SHORT.items():
        code = code.replace(short, full)
    return code


def one(blocks: list[Block], *how: str) -> Block:
    """Return the only block with these words in its comment."""
    (block,) = (block for block in blocks if set(how) <= set(block.how))
    return block


def prose(path: Path) -> str:
    """Return a document without its blocks."""
    return _BLOCK.sub("", path.read_text(encoding="utf-8"))
