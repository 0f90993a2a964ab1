"""What owners see of each other, by all ways in, and what it costs that it is nothing.

Part of the section ``promises``.
"""

import http.client
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import psycopg

from benchmarks.figures import Measurement
from benchmarks.owners import QUERIES as ROWS
from benchmarks.owners import Connection, Owner, acting_as, make_operator
from benchmarks.postgres import OWNERS
from benchmarks.web_process import WebProcess, token
from db import named_queries
from jobs.sql import JOBS, SESSIONS
from web.app import ENDPOINTS
from web.endpoints import Endpoint

QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))
WITH, WITHOUT = "row level security", "postgres, without"
SNAPSHOT = 5.0  # seconds for a stream of events to begin
# What to ask for where a value is needed that is nobody's.
VALUES = {
    "integer": 100,
    "bigint": 100,
    "smallint": 100,
    "real": 1,
    "double precision": 1,
    "boolean": False,
    "interval": "1 day",
    "timestamp with time zone": "2000-01-01",
    "jsonb": "{}",
    "bytea": b"",
}

METHOD = """\
**Row level security.** {owners} owners have jobs in each state, attempts, chunks, transcripts,
corrections, waveforms, webhooks with deliveries and audio in storage, each marked by a word of its
owner's. As each of them, and as `anon`, everything that the catalogue names is read: all tables
and views of the schemas `public`, `pgscribe` and `procrastinate`, and all functions of `public` or
that users may call, with the others' ids and words; and as each owner every `GET` of the REST API,
with the others' ids, search and events included. What comes back and has another owner's mark in
it, other than one that was part of the question, is counted. So that these are no empty tables, the
same was asked by whoever may (the owners, an operator, for tables `postgres`); *that have something
to hide* are those that showed them something. The cost: the transaction of `GET /jobs/{{id}}`, as
the API runs it as the owner, and its select alone as `postgres`, in turn, medians of {asks}, with
{more_jobs:,} more jobs of each of {all_owners} owners."""


@dataclass(frozen=True)
class Sizes:
    """How many owners look at each other, and what the cost is measured with."""

    owners: int = 4
    more_jobs: int = 400  # of each owner that there is
    asks: int = 600


QUICK = Sizes(2, 10, 60)


@dataclass(frozen=True)
class Reader:
    """Who asks: a role and a user."""

    role: str
    user: Owner


@dataclass(frozen=True)
class Sql:
    """A statement. ``of`` is whose ids it has in it, if any are."""

    conn: Connection
    kind: str
    statement: str
    values: tuple[object, ...] = ()
    of: Owner | None = None

    @property
    def said(self) -> frozenset[str]:
        """Return the marks that are in the question."""
        flat = itertools.chain.from_iterable(
            value if isinstance(value, list) else [value] for value in self.values
        )
        return frozenset(map(str, flat))

    def ask(self, reader: Reader) -> Sequence[str]:
        """Return the rows, as text; none if it is refused."""
        try:
            with acting_as(self.conn, reader.role, reader.user.id):
                rows = self.conn.execute(self.statement.encode(), self.values).fetchall()
        except (psycopg.errors.SyntaxError, psycopg.errors.UndefinedFunction):
            raise
        except psycopg.Error as error:
            if error.sqlstate is None:
                raise
            return [str(error)]
        return [str(row) for row in rows]


@dataclass(frozen=True)
class Rest:
    """A request."""

    web: WebProcess
    path: str
    of: Owner
    said: frozenset[str]
    kind: str = "paths"

    def ask(self, reader: Reader) -> Sequence[str]:
        """Return the answer: a file's whose link it is, a stream's first event."""
        path = self.path
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.web.port, timeout=SNAPSHOT)
            connection.request("GET", path, headers=_bearer(reader))
            answer = connection.getresponse()
            if answer.status != http.HTTPStatus.TEMPORARY_REDIRECT:
                break
            path = answer.headers["Location"]
            connection.close()
        stream = answer.headers.get_content_type() == "text/event-stream"
        body = _until_empty(answer) if stream else answer.read()
        connection.close()
        return [f"{answer.headers}\n{body.decode(errors='replace')}"]


def _bearer(reader: Reader) -> dict[str, str]:
    return {"Authorization": f"Bearer {token(reader.user.id)}"}


def _until_empty(stream: http.client.HTTPResponse) -> bytes:
    """Read events up to the snapshot's end, or the stream's."""
    read = b""
    while line := stream.readline():
        read += line
        if b"data:" in read and not line.strip():
            break
    return read


Question = Sql | Rest


def of_relations(conn: Connection, role: str) -> Iterator[Sql]:
    """Yield all tables and views, each with what the role may read of it."""
    for relation, columns in conn.execute(QUERIES["relations"], {"role": role}).fetchall():
        read = f"select x::text from (select {columns} from {relation}) x"  # noqa: S608 - its own
        yield Sql(conn, "relations", read)


def of_functions(conn: Connection, owners: Sequence[Owner]) -> Iterator[Sql]:
    """Yield calls of all functions, with each owner's ids and words."""
    for name, names, types, optional in conn.execute(QUERIES["functions"]).fetchall():
        arguments = list(zip(names or (), types or (), optional or (), strict=True))
        needed = [(n, t) for n, t, may in arguments if not may]
        with_ids = [(n, t) for n, t, may in arguments if not may or t in {"uuid", "uuid[]"}]
        for owner, given in itertools.product(owners, (needed, with_ids)):
            for values in _values(owner, [kind for _, kind in given]):
                places = ", ".join(f'"{n}" => %s::{t}' for n, t in given)
                yield Sql(
                    conn,
                    "functions",
                    f"select to_jsonb(f) from {name}({places}) f",  # noqa: S608 - of the catalogue
                    values,
                    owner,
                )
            if given == with_ids == needed:
                break


def _values(owner: Owner, types: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """Yield arguments: one set for each of the owner's ids, if any is asked for."""
    ids = (str(owner.id), owner.jobs["completed"], owner.endpoint, owner.deliveries[0])
    for one in ids if {"uuid", "uuid[]"} & {*types} else ids[:1]:
        known = VALUES | {"uuid": one, "uuid[]": [one], "text": owner.word, "text[]": [owner.word]}
        yield tuple(known.get(kind) for kind in types)


def of_paths(web: WebProcess, owners: Sequence[Owner]) -> Iterator[Rest]:
    """Yield requests for everything that can be read by REST, with each owner's ids."""
    for endpoint, owner in itertools.product(ENDPOINTS, owners):
        if endpoint.method == "GET" and "user" in endpoint.takes:
            yield _request(web, endpoint, owner)


def _request(web: WebProcess, endpoint: Endpoint, owner: Owner) -> Rest:
    parts = {
        "job_id": owner.jobs["completed"],
        "endpoint_id": owner.endpoint,
        "delivery_id": owner.deliveries[0],
        "owner_id": str(owner.id),
        "extension": "json",
        "model": "whisper-1",
    }
    used = {name: parts[name] for name in endpoint.path_parameters}
    path = endpoint.path.replace(":path}", "}").format(**used)
    query = endpoint.model("query")
    fields = query.model_fields if query else {}
    asked = {"q": owner.word} if "q" in fields else {}
    return Rest(web, f"{path}?{urlencode(asked)}", owner, frozenset({**used, **asked}.values()))


@dataclass
class Found:
    """What came of questions of one kind."""

    asked: int = 0
    answers: int = 0  # of which an owner or postgres sees something
    foreign: int = 0


def _marked(rows: Iterable[str], marks: frozenset[str]) -> int:
    return sum(any(mark in row for mark in marks) for row in rows)


def ask_all(
    questions: Sequence[Question], owners: Sequence[Owner], operator: Owner
) -> dict[str, Found]:
    """Ask each question as everybody whose it is not."""
    found = {question.kind: Found() for question in questions}
    for question in questions:
        counted = found[question.kind]
        theirs = question.of or owners[0]
        who_may = [Reader("authenticated", theirs), Reader("authenticated", operator)]
        if question.of is None:
            who_may = [Reader("postgres", theirs)]
        hidden = theirs.marks - question.said
        matters = any(_marked(question.ask(reader), hidden) for reader in who_may)
        readers = [Reader("authenticated", owner) for owner in owners if owner != question.of]
        if isinstance(question, Sql):
            readers.append(Reader("anon", operator))
        for reader in readers:
            others = [owner.marks for owner in owners if owner != reader.user]
            marks = frozenset().union(*others) - question.said
            counted.asked += 1
            counted.answers += matters
            counted.foreign += _marked(question.ask(reader), marks)
    return found


def cost(conn: Connection, owner: Owner, asks: int) -> dict[str, float]:
    """Return the milliseconds of reading a job, with policies and without."""
    values = {"id": owner.jobs["completed"]}
    claims = {"claims": f'{{"sub": "{owner.id}", "role": "authenticated"}}'}

    def read(*, as_owner: bool) -> float:
        begin = time.perf_counter()
        with conn.transaction():
            if as_owner:
                conn.execute(SESSIONS["act_as_user"], claims)
            rows = conn.execute(JOBS["get"], values).fetchall()
        taken = 1000 * (time.perf_counter() - begin)
        if len(rows) != 1:
            raise RuntimeError("The job was not found")
        return taken

    taken: dict[str, list[float]] = {WITHOUT: [], WITH: []}
    for number in range(2 * asks):
        name = (WITHOUT, WITH)[number % 2]
        taken[name].append(read(as_owner=name == WITH))
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(
    conn: Connection, web: WebProcess, owners: Sequence[Owner], sizes: Sizes, rounds: int
) -> Iterator[Measurement]:
    """Yield the lines."""
    questions: list[Question] = [
        *of_relations(conn, "authenticated"),
        *of_functions(conn, owners),
        *of_paths(web, owners),
    ]
    found = ask_all(questions, owners, make_operator(conn))
    for name, what, figures in (
        ("asked", "Questions asked", {kind: f.asked for kind, f in found.items()}),
        ("hidden", "… that have something to hide", {k: f.answers for k, f in found.items()}),
        ("seen", "Rows and answers of others seen", {k: f.foreign for k, f in found.items()}),
    ):
        yield Measurement(
            f"promises-rls-{name}",
            what,
            "rows" if name == "seen" else "questions",
            "lower" if name == "seen" else "higher",
            {f"by {kind}": [figure] for kind, figure in figures.items()},
            headline=name == "seen",
        )
    conn.execute(ROWS["more_jobs"], {"owners": OWNERS, "each": sizes.more_jobs})
    conn.execute("analyze public.processing_jobs")
    costs = [cost(conn, owners[0], sizes.asks) for _ in range(rounds)]
    yield Measurement(
        "promises-rls-cost",
        "Reading a job, as `GET /jobs/{id}` does",
        "ms",
        "lower",
        {name: [each[name] for each in costs] for name in (WITHOUT, WITH)},
        WITHOUT,
    )
