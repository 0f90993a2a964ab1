"""SQL lives in .sql files: named queries under ``-- name --`` headers, read by one loader."""

import re
from pathlib import Path

_HEADER = re.compile(r"^-- ([a-z0-9_]+) --$", re.MULTILINE)


def load(path: Path) -> dict[str, bytes]:
    """Return the queries of a file by name, as bytes, which psycopg takes as trusted SQL.

    What stands before the first header is commentary. A name used twice is a ``ValueError``.
    """
    _, *parts = _HEADER.split(path.read_text(encoding="utf-8"))
    names, bodies = parts[::2], parts[1::2]
    if len(set(names)) < len(names):
        raise ValueError(f"{path.name} has two queries of one name")
    return {name: body.strip().encode() for name, body in zip(names, bodies, strict=True)}
