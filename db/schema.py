"""What a migrated database has, to be compared with what one has in fact.

``schema.txt`` is made of a database that has just been migrated: ``python -m db.schema``. A test
compares the two.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from db import migrate, named_queries
from db.embedded import EmbeddedPostgres

_HERE = Path(__file__).parent
_QUERIES = named_queries.load(_HERE / "schema.sql")
_FILE = _HERE / "schema.txt"
_SEPARATOR = " | "


class Line(NamedTuple):
    """One thing to compare, such as ``trigger``, ``public.processing_jobs``, ``x: enabled``."""

    kind: str
    object: str
    detail: str


NAMES_IN_FULL = _QUERIES["names_in_full"]  # first, in the same transaction
QUERY = _QUERIES["objects"]


def expected() -> set[Line]:
    """Return what a database has that this version has migrated, and nobody has changed."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return {Line(*line.split(_SEPARATOR)) for line in lines}


def found(rows: list[tuple[Any, ...]]) -> set[Line]:
    """Return what ``QUERY`` has found, without what is not pgscribe's in the schema public."""
    ours = {line.object for line in expected()}
    lines = {Line(*row) for row in rows}
    return {line for line in lines if line.object in ours or not line.object.startswith("public.")}


def look(conn: psycopg.Connection) -> list[tuple[Any, ...]]:
    """Return what a database has."""
    with conn.transaction():
        conn.execute(NAMES_IN_FULL)
        return conn.execute(QUERY).fetchall()


def write(conn: psycopg.Connection) -> None:
    """Take what a database has that was migrated just now as what is expected."""
    rows = look(conn)
    text = "".join(_SEPARATOR.join(row) + "\n" for row in rows)
    _FILE.write_text(text, encoding="utf-8")


def main() -> None:
    """Migrate a database of its own and write down what it has then."""
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder, "postgres"))
        try:
            with server:
                migrate.migrate(server.url())
                with psycopg.connect(server.url()) as conn:
                    write(conn)
        finally:
            server.remove()


if __name__ == "__main__":
    main()
