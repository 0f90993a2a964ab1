"""Supabase Realtime: what the publication says of a job, as logical decoding has it."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql

from db.embedded import SUPERUSER, EmbeddedPostgres
from tests.conftest import TEMPLATE, migrated_postgres
from tests.doc_blocks import DOCS
from tests.streams import Work

REALTIME = Path("db/migrations/20261126090500_realtime.sql").read_bytes()
MEMBERS = """
select tablename, attnames from pg_publication_tables where pubname = 'supabase_realtime'
"""
ADDED = [("processing_jobs",)]
UNCHANGED = object()  # a large value that this change left alone is not sent
WORDS = 9_000  # that is an hour


@dataclass(frozen=True)
class Change:
    """A row's change, as pgoutput tells it. ``size`` is that of the message."""

    kind: str
    row: dict[str, object]
    size: int


class Decoder:
    """Reads pgoutput's messages, version 1 of the protocol, and keeps those about a table."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._columns: list[str] = []
        self._relation = -1

    def changes(self, messages: list[bytes]) -> Iterator[Change]:
        for message in messages:
            kind, body = message[:1].decode(), message[1:]
            if kind == "R":
                self._describe(body)
            elif kind in "IUD" and struct.unpack("!I", body[:4])[0] == self._relation:
                assert body[4:5] in {b"N", b"K"}, "the old row is not sent, but for its key"
                yield Change(kind, self._row(body[5:]), len(message))

    def _describe(self, body: bytes) -> None:
        (relation,) = struct.unpack("!I", body[:4])
        _, name, rest = body[4:].split(b"\0", 2)
        if name.decode() != self._table:
            return
        self._relation = relation
        (count,) = struct.unpack("!H", rest[1:3])
        rest, self._columns = rest[3:], []
        for _ in range(count):
            column, _, rest = rest[1:].partition(b"\0")
            self._columns.append(column.decode())
            rest = rest[8:]

    def _row(self, body: bytes) -> dict[str, object]:
        (count,) = struct.unpack("!H", body[:2])
        assert count == len(self._columns)
        at, values = 2, list[object]()
        for _ in range(count):
            kind, at = body[at : at + 1], at + 1
            if kind == b"t":
                (length,) = struct.unpack("!I", body[at : at + 4])
                values.append(body[at + 4 : at + 4 + length].decode())
                at += 4 + length
            else:
                values.append(UNCHANGED if kind == b"u" else None)
        return dict(zip(self._columns, values, strict=True))


@pytest.fixture(scope="module")
def logical(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A server that writes its log as Realtime needs it."""
    with migrated_postgres(tmp_path_factory.mktemp("logical"), wal_level="logical") as server:
        yield server


@pytest.fixture
def subscriber(logical: EmbeddedPostgres) -> Iterator[psycopg.Connection]:
    url = logical.url(database=TEMPLATE)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("select pg_create_logical_replication_slot('realtime', 'pgoutput')")
        yield connection
        connection.execute("select pg_drop_replication_slot('realtime')")


def an_hour() -> str:
    """Return a transcript of an hour, with the times of its words."""
    words = [
        {"start": n * 0.4, "end": n * 0.4 + 0.35, "word": f"word{n}", "probability": 0.987}
        for n in range(WORDS)
    ]
    segments = [
        {"start": part[0]["start"], "end": part[-1]["end"], "words": part,
         "text": " ".join(str(word["word"]) for word in part)}
        for part in (words[n : n + 15] for n in range(0, WORDS, 15))
    ]  # fmt: skip
    text = " ".join(str(segment["text"]) for segment in segments)
    return json.dumps({"text": text, "language": "en", "duration": 3600.0, "segments": segments})


def selected() -> list[str]:
    """Return the columns that the documentation's subscription selects."""
    document = (DOCS / "supabase-js.md").read_text(encoding="utf-8")
    _, found, rest = document.partition("select: [")
    assert found
    return [name.strip(" '\n") for name in rest.partition("]")[0].split(",")]


def test_what_subscribers_are_sent(
    logical: EmbeddedPostgres, subscriber: psycopg.Connection
) -> None:
    user = uuid4()
    subscriber.execute("insert into auth.users (id) values (%s)", (user,))
    with Work(logical.url(database=TEMPLATE)) as work:
        job = work.insert(user)
        work.start(job)
        for n in range(1, 11):
            work.progress(job, n / 20)
        work.note(job, "nearly done")
        transcript = an_hour()
        work.execute("update processing_jobs set result = %s where id = %s", (transcript, job))
        work.set_queue_status("succeeded", job)
        work.delete(job)
    rows = subscriber.execute(
        "select data from pg_logical_slot_get_binary_changes('realtime', null, null,"
        " 'proto_version', '1', 'publication_names', 'supabase_realtime')"
    ).fetchall()
    changes = list(Decoder("processing_jobs").changes([bytes(row[0]) for row in rows]))
    assert [change.kind for change in changes] == ["I", *"U" * 14, "D"]
    inserted, claimed, *progress, noted, written, completed, deleted = changes

    assert {change.row["user_id"] for change in changes[:-1]} == {str(user)}
    assert [change.row["status"] for change in (inserted, claimed, completed)] == [
        "queued", "processing", "completed",
    ]  # fmt: skip
    assert [change.row["progress"] for change in progress[:2]] == ["0.05", "0.1"]
    assert noted.row["note"] == "nearly done"
    # The transcript is in the one change that writes it; those after it leave it out.
    assert isinstance(written.row["result"], str)
    assert json.loads(written.row["result"]) == json.loads(transcript)
    assert completed.row["result"] is UNCHANGED
    assert {name for name, value in deleted.row.items() if value is not None} == {"id"}
    assert max(change.size for change in changes if change is not written) < 1000

    # Whoever selects columns, as the documentation does, is sent these and no transcript.
    columns = selected()
    assert set(columns) < set(inserted.row)
    assert "result" not in columns
    for change in changes[:-1]:
        event = {name: change.row[name] for name in columns}
        assert len(json.dumps(event)) < 500


@pytest.mark.parametrize(
    ("publication", "members"),
    [
        ("create publication supabase_realtime", ADDED),
        ("create publication supabase_realtime for table processing_jobs", ADDED),
        ("create publication supabase_realtime for tables in schema public", None),
        ("create publication supabase_realtime for all tables", None),
        (None, []),
    ],
)
def test_the_publication_may_be_another(
    conn: psycopg.Connection, postgres: EmbeddedPostgres, publication: str | None,
    members: list[tuple[str]] | None,
) -> None:  # fmt: skip
    conn.execute("drop publication supabase_realtime")
    with psycopg.connect(
        postgres.url(user=SUPERUSER, database=conn.info.dbname), autocommit=True
    ) as admin:
        if publication is not None:
            admin.execute(publication.encode())
            if members is not None:
                admin.execute("alter publication supabase_realtime owner to postgres")
    for _ in range(2):
        conn.execute(REALTIME)
        found = conn.execute(MEMBERS.encode()).fetchall()
        if members is None:
            assert ADDED[0][0] in {name for name, _ in found}
        else:
            assert [(name,) for name, _ in found] == members


def test_somebody_elses_publication_is_left_alone(
    conn: psycopg.Connection, postgres: EmbeddedPostgres
) -> None:
    notices: list[str] = []
    conn.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    with psycopg.connect(
        postgres.url(user=SUPERUSER, database=conn.info.dbname), autocommit=True
    ) as admin:
        admin.execute("alter publication supabase_realtime drop table processing_jobs")
        admin.execute(
            sql.SQL("alter publication supabase_realtime owner to {}").format(
                sql.Identifier(SUPERUSER)
            )
        )
    conn.execute(REALTIME)
    assert conn.execute(MEMBERS.encode()).fetchall() == []
    assert any("Its owner has to: alter publication" in notice for notice in notices)


def test_jobs_are_published_by_their_key_alone(conn: psycopg.Connection) -> None:
    """With the whole old row as identity, each progress of a job would write its transcript."""
    row = conn.execute(
        "select relreplident = 'd' from pg_class where oid = 'public.processing_jobs'::regclass"
    ).fetchone()
    assert row == (True,)
    (found,) = conn.execute(MEMBERS.encode()).fetchall()
    assert found[0] == "processing_jobs"
