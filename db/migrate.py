"""Forward-only migrations: procrastinate's own, from the installed package, then ours.

The ledger is the Supabase CLI's, so ``pgscribe migrate`` and ``supabase db push`` (over the
files that :func:`export` writes) are interchangeable.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import psycopg

from db import named_queries

_HERE = Path(__file__).parent
_QUERIES = named_queries.load(_HERE / "migrate.sql")
_OWN_FILE = re.compile(r"(\d{14})_(\w+)\.sql")
PATIENCE = 10.0  # seconds to wait for another `pgscribe migrate`
CONNECT_TIMEOUT = 10  # seconds
_EXISTS = frozenset(["42701", "42710", "42723", "42P06", "42P07"])  # a column, trigger, table, …
# Pauses between attempts at a migration whose locks somebody else holds; workers go on meanwhile.
PAUSES = (1.0, 2.0, 4.0, *([5.0] * 11))

_PROCRASTINATE_FILE = re.compile(r"(\d\d)\.(\d\d)\.(\d\d)_(\d\d)_(\w+)\.sql")


class MigrationBlocked(Exception):
    """A migration was not applied, as others hold locks that it needs; the message says who."""


class MigrationFailed(Exception):
    """The database refused a migration; the message says which, why, and what may help."""


class _InTheWay(Exception):
    """Somebody else holds a lock."""


@dataclass(frozen=True, slots=True, order=True)
class Migration:
    """One file of SQL, applied in one transaction. ``version`` has 14 digits and orders them."""

    version: str
    name: str
    sql: str

    @property
    def filename(self) -> str:
        """The file's name as the Supabase CLI wants it."""
        return f"{self.version}_{self.name}.sql"


def migrations() -> list[Migration]:
    """Return every migration that this version of pgscribe knows, in order."""
    return sorted([*_procrastinate_migrations(), *_own_migrations()])


def _own_migrations() -> Iterator[Migration]:
    for path in (_HERE / "migrations").glob("*.sql"):
        match = _OWN_FILE.fullmatch(path.name)
        if match is None:
            raise ValueError(f"db/migrations/{path.name}: name it <14 digits>_<name>.sql")
        yield Migration(match[1], match[2], path.read_text(encoding="utf-8"))


def _procrastinate_migrations() -> Iterator[Migration]:
    before = (_HERE / "procrastinate_before.sql").read_text(encoding="utf-8")
    after = (_HERE / "procrastinate_after.sql").read_text(encoding="utf-8")
    for resource in resources.files("procrastinate.sql.migrations").iterdir():
        match = _PROCRASTINATE_FILE.fullmatch(resource.name)
        if match is None:
            continue
        # Procrastinate's 03.04.00_01 becomes 20000304000100: unmistakable, and older than ours.
        version = "2000" + "".join(match.groups()[:4]) + "00"
        sql = f"{before}\n{resource.read_text(encoding='utf-8')}\n;{after}"
        yield Migration(version, f"procrastinate_{match[5]}", sql)


def pending(conn: psycopg.Connection) -> list[Migration]:
    """Return the migrations that ``conn``'s database lacks, in order."""
    row = conn.execute(_QUERIES["ledger_exists"]).fetchone()
    if row is None or not row[0]:
        return migrations()
    applied = {version for (version,) in conn.execute(_QUERIES["applied_versions"])}
    return [migration for migration in migrations() if migration.version not in applied]


def migrate(
    url: str,
    on_applied: Callable[[Migration], None] = lambda _: None,
    on_blocked: Callable[[str], None] = lambda _: None,
) -> int:
    """Apply what is missing in the database at ``url`` and return how many that were.

    Each migration and its ledger entry commit together. Several processes may do this at once:
    an advisory lock, held for one transaction so that a transaction-mode pooler is no hindrance,
    lets one of them apply each migration.

    A statement waits a second for a lock at most, so that nobody waits behind it for longer; then
    all of the migration is tried again for about a minute. ``on_blocked`` hears who holds it up.
    Raises ``MigrationBlocked`` and ``MigrationFailed``.
    """
    applied = 0
    with psycopg.connect(
        url, autocommit=True, prepare_threshold=None, connect_timeout=CONNECT_TIMEOUT
    ) as conn:
        with conn.transaction():
            _take_turn(conn)
            conn.execute(_QUERIES["create_ledger"])
        for migration in pending(conn):
            if _insist(conn, migration, on_blocked):
                applied += 1
                on_applied(migration)
    return applied


def _take_turn(conn: psycopg.Connection) -> None:
    try:
        conn.execute(_QUERIES["lock"], {"milliseconds": round(PATIENCE * 1000)})
    except psycopg.errors.LockNotAvailable as exc:
        raise MigrationBlocked(
            f"Another `pgscribe migrate` has been at work here for {PATIENCE:g} s, or somebody "
            "holds its lock: pg_locks says who (locktype advisory). Run it again afterwards."
        ) from exc


def _insist(
    conn: psycopg.Connection, migration: Migration, on_blocked: Callable[[str], None]
) -> bool:
    for pause in PAUSES:
        try:
            return _apply(conn, migration)
        except _InTheWay:
            on_blocked(f"{migration.filename} waits for {_holders(conn)}")
        time.sleep(pause)
    try:
        return _apply(conn, migration)
    except _InTheWay as exc:
        raise MigrationBlocked(
            f"{migration.filename} was not applied: it waits for {_holders(conn)}. Nothing of it "
            "is left behind; let them end, or end them with select pg_terminate_backend(<pid>), "
            "and run `pgscribe migrate` again."
        ) from exc


def _holders(conn: psycopg.Connection) -> str:
    """Say whose transactions hold locks: what they do is not said, as it may hold anything."""
    found = [
        f"{who} (pid {pid}, in a transaction for {seconds} s, on {tables})"
        for pid, who, seconds, tables in conn.execute(_QUERIES["holders"])
    ]
    return ", ".join(found) or "locks of somebody who has gone meanwhile"


def _apply(conn: psycopg.Connection, migration: Migration) -> bool:
    with conn.transaction():
        _take_turn(conn)
        row = conn.execute(_QUERIES["is_applied"], {"version": migration.version}).fetchone()
        if row is not None and row[0]:
            return False
        conn.execute(_QUERIES["be_brief"])
        try:
            conn.execute(migration.sql.encode())
            conn.execute(
                _QUERIES["record"],
                {"version": migration.version, "name": migration.name, "sql": migration.sql},
            )
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as exc:
            raise _InTheWay from exc
        except psycopg.OperationalError:  # the database is gone
            raise
        except psycopg.Error as exc:
            raise MigrationFailed(_refused(migration, exc)) from exc
    return True


def _refused(migration: Migration, exc: psycopg.Error) -> str:
    said = exc.diag.message_primary or str(exc)
    refused = f"{migration.filename} was not applied, and nothing of it is left behind: {said}."
    if exc.sqlstate not in _EXISTS:
        return refused
    return (
        f"{refused} If that is what an earlier run of it has made, the ledger "
        "supabase_migrations.schema_migrations has lost its row, as after a restore without that "
        "schema: restore it, or note what is there with `pgscribe migrate --export "
        "supabase/migrations && supabase migration repair --status applied "
        f"{migration.version}`, and run `pgscribe migrate` again"
    )


def export(directory: Path) -> list[Path]:
    """Write every migration into ``directory`` for ``supabase db push``; return the files."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / migration.filename for migration in migrations()]
    for path, migration in zip(paths, migrations(), strict=True):
        path.write_text(migration.sql, encoding="utf-8")
    return paths
