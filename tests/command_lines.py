"""Reads the command lines of the documentation, and checks them without running them."""

import contextlib
import re
import shlex
from collections.abc import Iterator, Sequence

import click

_PLACEHOLDER = re.compile(r"<[A-Za-z][^<>\n]*>")
_COMMENT = re.compile(r"""("[^"]*"|'[^']*')|(?:^|(?<=\s))#.*$""", re.MULTILINE)
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_END = re.compile(r"[;&|\n]+")


def filled(code: str) -> str:
    """Return code with a word in the place of each ``<what is yours>``."""
    return _PLACEHOLDER.sub("yours", code)


def without_comments(code: str) -> str:
    return _COMMENT.sub(lambda found: found[1] or "", code)


def commands(code: str) -> Iterator[list[str]]:
    """Yield the words of each command of a script that has no more than lists and pipes."""
    code = without_comments(filled(code)).replace("\\\n", " ")
    reader = shlex.shlex(code, posix=True, punctuation_chars=";&|\n<>")
    reader.whitespace, reader.whitespace_split, reader.commenters = " \t", True, ""
    words: list[str] = []
    for word in [*reader, "\n"]:
        if not _END.fullmatch(word):
            words.append(word)
            continue
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        if ">" in words:
            del words[words.index(">") : words.index(">") + 2]
        if words:
            yield words
        words = []


def parse(program: click.Command, name: str, words: Sequence[str]) -> None:
    """Have click parse a command line, but not run it. Raises click.UsageError."""
    context = click.Context(program, info_name=name)
    left = [*words]
    while isinstance(program, click.Group) and left and not left[0].startswith("-"):
        name, program, left = program.resolve_command(context, left)  # type: ignore[assignment]
        context = click.Context(program, info_name=name, parent=context)
    with contextlib.suppress(click.exceptions.Exit):  # --help, --version
        program.make_context(name, left, parent=context.parent)
