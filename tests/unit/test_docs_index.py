"""docs/README.md leads to every document."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_every_document_is_listed() -> None:
    text = (DOCS / "README.md").read_text(encoding="utf-8")
    listed = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^):#]+)\)", text)}
    documents = set(DOCS.rglob("*.md")) - {DOCS / "README.md"}
    assert len(documents) > 35
    assert documents <= listed
