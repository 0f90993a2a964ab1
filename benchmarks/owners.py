"""Owners with something of theirs in all that an API reads, each marked by a word of its own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from benchmarks.filling import TRANSCRIPT
from benchmarks.postgres import OWNERS
from db import named_queries

Connection = psycopg.Connection[Any]
QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))
# How a job gets into each state: what its queue job goes through.
STATES = {
    "queued": (),
    "processing": ("doing",),
    "completed": ("doing", "succeeded"),
    "failed": ("doing", "failed"),
    "cancelled": ("cancelled",),
}


@dataclass(frozen=True)
class Owner:
    """A user, and by what one knows what is theirs."""

    id: UUID
    word: str
    jobs: dict[str, str]  # by state
    endpoint: str
    deliveries: tuple[str, ...]

    @property
    def marks(self) -> frozenset[str]:
        """Return what is in whatever is theirs, and in nothing of anybody else's."""
        return frozenset(
            (str(self.id), self.word, *self.jobs.values(), self.endpoint, *self.deliveries)
        )


@contextmanager
def acting_as(conn: Connection, role: str, user: UUID) -> Iterator[None]:
    """Run a transaction as PostgREST would for this user; it leaves nothing."""
    with conn.transaction(force_rollback=True):
        become(conn, role, user)
        yield


def become(conn: Connection, role: str, user: UUID) -> None:
    """Be somebody else until the transaction ends."""
    claims = json.dumps({"sub": str(user), "role": role})
    query = b"select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)"
    conn.execute(query, (role, claims))


def make(conn: Connection, storage: Path, number: int) -> Owner:
    """Give an owner something of everything. They must be there."""
    owner = OWNERS[number]
    word = f"marked{'abcdefghij'[number] * 8}"
    values: dict[str, object] = {"owner": owner, "word": word}

    def run(query: str, **more: object) -> list[tuple[Any, ...]]:
        cursor = conn.execute(QUERIES[query], values | more)
        return cursor.fetchall() if cursor.description else []

    ((endpoint,),) = run("endpoint")
    jobs: dict[str, str] = {}
    for state, path in STATES.items():
        ((job,),) = run("job", state=state)
        jobs[state] = str(job)
        for status in path:
            if status == "succeeded":
                segments = [part | {"text": word} for part in TRANSCRIPT["segments"]]  # type: ignore[attr-defined]
                result = TRANSCRIPT | {"text": word, "segments": segments}
                run("set_result", id=job, result=Jsonb(result))
            if status == "failed":
                run("set_error", id=job)
            run("set_queue", id=job, status=status)
        if state != "queued":
            for query in ("attempt", "chunk", "waveform", "preparation"):
                run(query, id=job)
        audio = storage / str(owner) / f"{word}-{state}.wav"
        audio.parent.mkdir(parents=True, exist_ok=True)
        audio.write_text(word)
    run("correction", id=jobs["completed"])
    run("webhook_attempts")
    deliveries = tuple(delivery for (delivery,) in run("deliveries"))
    return Owner(owner, word, jobs, str(endpoint), deliveries)


def make_operator(conn: Connection) -> Owner:
    """Let somebody operate who owns nothing."""
    operator = OWNERS[-1]
    conn.execute(QUERIES["operator"], {"owner": operator})
    return Owner(operator, "nothing", {}, "nothing", ())
