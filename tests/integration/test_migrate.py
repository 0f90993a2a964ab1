"""Migrations: forward only, each in a transaction, one at a time, shared with the Supabase CLI."""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner
from procrastinate import schema

from db import migrate, named_queries
from db.embedded import EmbeddedPostgres
from jobs.cli import main
from jobs.doctor.checks import Context
from jobs.doctor.structure import check_migrations, check_schema
from jobs.settings import Settings
from tests.streams import until

SUPABASE = shutil.which("supabase")
Supabase = Callable[..., str]
needs_supabase = pytest.mark.skipif(
    SUPABASE is None, reason="needs the `supabase` CLI on PATH (npm: supabase)"
)
# Rows are appended there, and taken away all at once; nobody asks for a single one. A key would be
# one more index to write for each job. See docs/decisions/0009-dashboard-and-realtime.md.
ENTRIES_WITHOUT_A_KEY = ("pgscribe.woken_owners", "pgscribe.usage_news", "pgscribe.daily_totals")


@pytest.fixture
def empty(postgres: EmbeddedPostgres, database_names: Iterator[str]) -> Iterator[str]:
    """A database like a new Supabase project's."""
    name = next(database_names)
    postgres.create_database(name)
    postgres.bootstrap(name)
    yield postgres.url(database=name)
    postgres.drop_database(name)


def ledger(url: str) -> list[str]:
    with psycopg.connect(url) as conn:
        rows = conn.execute("select version from supabase_migrations.schema_migrations order by 1")
        return [version for (version,) in rows]


def shape(url: str, schema_name: str) -> set[tuple[object, ...]]:
    """Columns, functions, triggers and indexes of a schema."""
    with psycopg.connect(url) as conn:
        return set(
            conn.execute(
                """
                select 'column', table_name, column_name, data_type from information_schema.columns
                 where table_schema = %(schema)s
                union all
                select 'function', p.oid::regprocedure::text, md5(prosrc), '' from pg_proc p
                 where pronamespace = %(schema)s::regnamespace
                union all
                select 'index', indexname, replace(indexdef, %(schema)s || '.', ''), ''
                  from pg_indexes where schemaname = %(schema)s
                """,
                {"schema": schema_name},
            ).fetchall()
        )


def test_everything_is_applied_once_as_a_mere_owner(empty: str) -> None:
    applied: list[migrate.Migration] = []
    assert migrate.migrate(empty, applied.append) == len(migrate.migrations())
    assert applied == migrate.migrations()
    assert ledger(empty) == [migration.version for migration in applied]
    assert migrate.migrate(empty) == 0
    with psycopg.connect(empty) as conn:
        assert migrate.pending(conn) == []
        row = conn.execute("select rolsuper from pg_roles where rolname = current_user").fetchone()
        assert row == (False,)


def test_several_processes_migrate_one_database(empty: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(migrate.migrate, [empty] * 4))
    assert sum(counts) == len(migrate.migrations())
    assert len(ledger(empty)) == sum(counts)


def test_a_broken_migration_leaves_nothing_and_the_next_run_goes_on(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = migrate.Migration("29990101000000", "broken", "create table half (); select 1 / 0;")
    whole = migrate.migrations()
    monkeypatch.setattr(migrate, "migrations", lambda: [*whole, broken])
    with pytest.raises(migrate.MigrationFailed) as caught:
        migrate.migrate(empty)
    assert str(caught.value) == (
        "29990101000000_broken.sql was not applied, and nothing of it is left behind: division by "
        "zero."
    )
    with psycopg.connect(empty) as conn:
        assert migrate.pending(conn) == [broken]
        assert conn.execute("select to_regclass('half')").fetchone() == (None,)
    monkeypatch.setattr(migrate, "migrations", lambda: whole)
    assert migrate.migrate(empty) == 0


def test_migrations_and_who_reads_and_then_writes_do_not_wait_for_each_other(
    empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an old worker does all the time, whose transaction began before."""
    whole = migrate.migrations()
    before = [known for known in whole if known.version < "20261126090000"]
    with monkeypatch.context() as patch:
        patch.setattr(migrate, "migrations", lambda: before)
        migrate.migrate(empty)
    tables = ("processing_jobs", "webhook_deliveries", "webhook_endpoints")
    with (
        psycopg.connect(empty) as worker,
        psycopg.connect(empty, autocommit=True) as conn,
        ThreadPoolExecutor(1) as pool,
    ):
        for table in tables:
            worker.execute(f"select from {table}".encode())
        migrated = pool.submit(migrate.migrate, empty)
        blocked = (
            "select exists (select from pg_stat_activity where %s = any (pg_blocking_pids(pid)))"
        )
        pid = worker.info.backend_pid
        until(lambda: conn.execute(blocked, (pid,)).fetchone() == (True,), "it waits for a lock")
        for table in tables:
            worker.execute(f"update {table} set user_id = user_id where false".encode())
        worker.commit()
        assert migrated.result() == len(whole) - len(before)


def test_the_queue_is_what_procrastinate_would_have_made(
    database: str, postgres: EmbeddedPostgres, database_names: Iterator[str]
) -> None:
    name = next(database_names)
    postgres.create_database(name)
    plain = postgres.url(database=name)
    with psycopg.connect(plain) as conn:
        conn.execute("create schema procrastinate; set search_path = procrastinate")
        conn.execute(schema.SchemaManager.get_schema().encode())
    ours, theirs = shape(database, "procrastinate"), shape(plain, "procrastinate")
    assert {row for row in ours if not str(row[1]).startswith("pgscribe_")} == theirs
    postgres.drop_database(name)


def test_procrastinates_functions_work_from_any_session(conn: psycopg.Connection) -> None:
    rows = conn.execute(
        "select oid::regprocedure from pg_proc"
        " where pronamespace = 'procrastinate'::regnamespace and proconfig is null"
    ).fetchall()
    assert rows == []
    row = conn.execute(
        "select procrastinate.procrastinate_defer_jobs_v1(array[row('q', 't', 0, null, null, '{}',"
        " null)::procrastinate.procrastinate_job_to_defer_v1])"
    ).fetchone()
    assert row == ([1],)


def test_versions_are_unique_and_ours_come_last() -> None:
    versions = [migration.version for migration in migrate.migrations()]
    assert len(set(versions)) == len(versions)
    assert all(len(version) == 14 and version.isdigit() for version in versions)
    own = [migration for migration in migrate.migrations() if migration.version > "2026"]
    assert own[0].name == "processing_jobs"
    assert migrate.migrations()[-len(own) :] == own


@pytest.fixture
def supabase(empty: str, tmp_path: Path) -> Supabase:
    """Run the Supabase CLI on the empty database; return what it says, as JSON if asked for."""
    migrate.export(tmp_path / "supabase" / "migrations")

    def run(*arguments: str) -> str:
        return subprocess.run(
            [str(SUPABASE), *arguments, f"--remote={empty}?sslmode=disable"],
            cwd=tmp_path,
            env=os.environ | {"SUPABASE_TELEMETRY_DISABLED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if "json" in arguments else subprocess.STDOUT,
            text=True,
            check=True,
        ).stdout

    return run


def missing_by_pgscribe(url: str) -> tuple[int, set[str], str]:
    """Return exit status, versions and the last line of ``pgscribe migrate --status``."""
    answer = CliRunner().invoke(main, ["migrate", "--status"], env={"PGSCRIBE_DATABASE_URL": url})
    *missing, summary = answer.output.splitlines()
    return answer.exit_code, {line.split()[1][:14] for line in missing}, summary


def missing_by_supabase(supabase: Supabase) -> set[str]:
    listed = json.loads(supabase("migration", "list", "--output-format", "json"))["migrations"]
    assert [row["local"] for row in listed] == [known.version for known in migrate.migrations()]
    assert all(row["remote"] in {"", row["local"]} for row in listed)
    return {row["local"] for row in listed if not row["remote"]}


@needs_supabase
def test_supabase_db_push_and_pgscribe_migrate_are_interchangeable(
    empty: str, supabase: Supabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [migration.version for migration in migrate.migrations()]
    assert missing_by_supabase(supabase) == set(known)
    assert missing_by_pgscribe(empty)[:2] == (1, set(known))

    with monkeypatch.context() as patch:  # half by us, half by the CLI
        half = migrate.migrations()[:20]
        patch.setattr(migrate, "migrations", lambda: half)
        assert migrate.migrate(empty) == len(half)
    behind = f"{len(known) - 20} of {len(known)} migrations are missing"
    assert missing_by_supabase(supabase) == set(known[20:])
    assert missing_by_pgscribe(empty) == (1, set(known[20:]), behind)

    assert "Finished" in supabase("db", "push", "--yes", "--skip-vault")
    assert migrate.migrate(empty) == 0
    assert ledger(empty) == known
    assert missing_by_supabase(supabase) == set()
    done = f"0 of {len(known)} migrations are missing"
    assert missing_by_pgscribe(empty) == (0, set(), done)
    context = Context(Settings.load(database_url=empty))
    found = [asyncio.run(check(context)) for check in (check_migrations, check_schema)]
    assert [finding.status for finding in found] == ["ok", "ok"], found


@needs_supabase
def test_supabases_advisors_find_nothing_but_what_is_meant(empty: str, supabase: Supabase) -> None:
    migrate.migrate(empty)

    def findings() -> set[tuple[str, str]]:
        arguments = ("--level", "info", "--fail-on", "none", "--output-format", "json")
        found = json.loads(supabase("db", "advisors", *arguments))["results"]
        return {(lint["name"], f"{lint['metadata'].get('schema')}.{lint['metadata'].get('name')}")
                for lint in found}  # fmt: skip

    def meant() -> set[tuple[str, str]]:
        # No index of a new database has been used yet.
        return {finding for finding in findings() if finding[0] != "unused_index"}

    assert meant() == {("no_primary_key", table) for table in ENTRIES_WITHOUT_A_KEY}
    # They look everywhere: what is wrong in any of the schemas is found.
    with psycopg.connect(empty, autocommit=True) as conn:
        for schema in ("public", "pgscribe", "procrastinate"):
            conn.execute(
                f"create function {schema}.loose() returns int language sql return 1;"
                f"create table {schema}.open"
                f" (id int primary key, other int references {schema}.open)".encode()
            )
        conn.execute("create view public.of_its_owner as select * from public.processing_jobs")
        conn.execute("grant select on public.open, public.of_its_owner to anon")
    found = meant()
    for schema in ("public", "pgscribe", "procrastinate"):
        assert ("function_search_path_mutable", f"{schema}.loose") in found
        assert ("unindexed_foreign_keys", f"{schema}.open") in found
    assert ("rls_disabled_in_public", "public.open") in found
    assert ("security_definer_view", "public.of_its_owner") in found


def test_a_query_file_must_not_use_a_name_twice(tmp_path: Path) -> None:
    path = tmp_path / "twice.sql"
    path.write_text("-- About.\n\n-- a --\nselect 1\n\n-- b --\nselect 2\n")
    assert named_queries.load(path) == {"a": b"select 1", "b": b"select 2"}
    path.write_text("-- a --\nselect 1\n-- a --\nselect 2\n")
    with pytest.raises(ValueError, match="two queries of one name"):
        named_queries.load(path)
