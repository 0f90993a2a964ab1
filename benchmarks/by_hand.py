"""Writing by hand what is derived: as every role, in every state.

Part of the section ``promises``.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psycopg

from benchmarks.figures import Measurement
from benchmarks.owners import STATES, Connection, Owner, become
from db import named_queries

QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))
ROLES = ("postgres", "service_role", "authenticated", "anon")

METHOD = """\
**One truth.** On jobs in each of the five states, each role, `authenticated` as the owner, tries to
write each other status: alone, with all that goes with it, right after the queue has changed it in
the same transaction, and in an insert. *By a forged switch*: after `set pgscribe.mirroring = 'on'`,
which is what the mirror's trigger sets while it writes, with `updated_at` as the mirror writes it.
*Other columns*: each column of `processing_jobs`, and of the other tables about jobs and webhooks,
that users may not update; workers connect as `postgres` and write these. An attempt counts as
accepted if the value is another one afterwards; then it is rolled back. At last, over all databases
of this section: rows whose status is not what their queue job says,
or that have none."""


@dataclass
class Agreement:
    """How many rows of all databases were looked at, and how many say something else."""

    rows: int = 0
    differing: int = 0

    def look(self, conn: Connection) -> None:
        """Look at all jobs of a database."""
        ((rows, differing),) = conn.execute(QUERIES["agreement"]).fetchall()
        self.rows += rows
        self.differing += differing

    def measurements(self) -> Iterator[Measurement]:
        """Yield the lines."""
        for name, what, figure in (
            ("rows", "Rows compared with the queue, in all databases of this section", self.rows),
            ("differing", "Rows whose status is not what the queue says", self.differing),
        ):
            yield Measurement(
                f"promises-truth-{name}",
                what,
                "rows",
                "higher" if name == "rows" else "lower",
                {"pgscribe": [figure]},
                headline=name == "differing",
            )


@dataclass
class Attempts:
    """What was tried and accepted, by kind and role."""

    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    accepted: Counter[tuple[str, str]] = field(default_factory=Counter)


@dataclass(frozen=True)
class Try:
    """A statement as a role. ``before`` is executed by postgres, ``sees`` tells what changed."""

    kind: str
    statement: bytes
    sees: bytes
    values: Mapping[str, object]
    before: Sequence[str] = ()

    def accepted(self, conn: Connection, role: str, owner: Owner) -> bool:
        """Try it; it leaves nothing."""
        with conn.transaction(force_rollback=True):
            for query in self.before:
                conn.execute(QUERIES[query], self.values)
            was = conn.execute(self.sees, self.values).fetchall()
            try:
                with conn.transaction():
                    become(conn, role, owner.id)
                    conn.execute(self.statement, self.values)
                    conn.execute("reset role")
            except psycopg.errors.SyntaxError:
                raise
            except psycopg.Error:
                return False
            return bool(conn.execute(self.sees, self.values).fetchall() != was)


def of_status(owner: Owner) -> Iterator[Try]:
    """Yield attempts to write a status."""
    for state, job in owner.jobs.items():
        for status in STATES:
            values = {"id": job, "status": status, "owner": str(owner.id), "new": str(uuid4())}
            if status != state:
                for query in ("set_status", "set_status_and_all"):
                    yield Try("status", QUERIES[query], QUERIES["status"], values)
                yield Try("forged", QUERIES["forge"], QUERIES["status"], values, ["switch_on"])
            if state == "queued" and status != "processing":
                statement = QUERIES["set_status_and_all"]
                yield Try("status", statement, QUERIES["status"], values, ["move_queue"])
            if state == "queued" and status != "queued":
                seen = QUERIES["status"].replace(b"%(id)s", b"%(new)s")
                yield Try("status", QUERIES["insert_status"], seen, values)


def of_columns(conn: Connection) -> Iterator[Try]:
    """Yield attempts to write what else only pgscribe writes."""
    relations = [row[0] for row in conn.execute(QUERIES["relations"])]
    for relation in relations:
        columns = conn.execute(QUERIES["columns"], {"relation": relation}).fetchall()
        for name, value in columns:
            statement = f'update public.{relation} set "{name}" = {value}'  # noqa: S608 - of the catalogue
            sees = f'select "{name}" from public.{relation} x order by x::text'  # noqa: S608 - of the catalogue
            yield Try("columns", statement.encode(), sees.encode(), {})


def attempt_all(conn: Connection, owner: Owner) -> Attempts:
    """Try everything as everybody."""
    found = Attempts()
    for one in (*of_status(owner), *of_columns(conn)):
        for role in ROLES:
            found.tried[one.kind, role] += 1
            found.accepted[one.kind, role] += one.accepted(conn, role, owner)
    return found


def measure(conn: Connection, owner: Owner) -> Iterator[Measurement]:
    """Yield the lines."""
    found = attempt_all(conn, owner)
    for kind, what in (
        ("status", "Writes of status"),
        ("forged", "Writes of status by a forged switch"),
        ("columns", "Writes of other columns"),
    ):
        for name, counts in (("tried", found.tried), ("accepted", found.accepted)):
            yield Measurement(
                f"promises-truth-{kind}-{name}",
                f"{what}, {name}",
                "attempts",
                "lower" if name == "accepted" else "higher",
                {role: [counts[kind, role]] for role in ROLES},
                headline=(kind, name) == ("status", "accepted"),
            )
