"""docs/README.md lists every document, and links between documents lead somewhere."""

import re
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[2]
DOCS = REPO / "docs"
PLACES = ("*.md", "docs/**/*.md", "examples/*.md", "tests/local_modal/*.md")
# What other steps make: until it is there, nobody can be led to it.
TO_COME = {REPO / "benchmarks" / "report.md", DOCS / "scaling.md"}

_BLOCK = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]*)\)")
_LINKED = re.compile(r"\[([^]]*)\]\([^)]*\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def documents() -> list[Path]:
    return sorted({path for place in PLACES for path in REPO.glob(place)})


def prose(path: Path) -> str:
    """Return a document without its blocks of code, which may hold what looks like a link."""
    return _BLOCK.sub("", path.read_text(encoding="utf-8"))


def links(path: Path) -> list[str]:
    return _LINK.findall(prose(path))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    titles = [_LINKED.sub(r"\1", title) for title in _HEADING.findall(prose(path))]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(path: Path) -> Iterator[str]:
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if target in TO_COME - set(REPO.glob("*/*.md")):
            continue
        if not target.exists():
            yield f"{path.name}: {link}: there is no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{path.name}: {link}: there is no such heading"


def test_links_lead_somewhere() -> None:
    assert [problem for path in documents() for problem in broken(path)] == []
    assert sum(len(links(path)) for path in documents()) > 200


def test_broken_links_are_found(tmp_path: Path) -> None:
    text = """# Of `code`, [links](other.md) and more
[good](#of-code-links-and-more) [no file](other.md) [no heading](#other) [elsewhere](https://example.org/x)
```
[code](nothing.md)
# no heading
```
[image <b>](./a.md#of-code-links-and-more)"""
    document = tmp_path / "a.md"
    document.write_text(text, encoding="utf-8")
    assert list(broken(document)) == [
        "a.md: other.md: there is no such file",
        "a.md: other.md: there is no such file",
        "a.md: #other: there is no such heading",
    ]


def test_every_document_is_listed() -> None:
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "README.md")}
    assert set(DOCS.rglob("*.md")) - {DOCS / "README.md"} <= listed
