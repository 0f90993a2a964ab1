"""The commands of docs/self-hosting.md and docs/supabase.md, as far as they need no Docker."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from click.testing import CliRunner
from dotenv import dotenv_values

from db import migrate
from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs import self_hosting
from jobs.cli import main
from tests.conftest import REPO
from tests.doc_blocks import Block, runs

SUPABASE = shutil.which("supabase")
BLOCKS = {block.how[1]: block for block in runs("project")}


def test_each_block_is_run() -> None:
    steps = {"migrate", "push", "storage", "operators", "remove"}
    assert set(BLOCKS) == steps | {"operator", "renew"}


def commands(block: Block) -> Iterator[list[str]]:
    """Yield pgscribe's commands of a block; those in a container run here."""
    inside = "docker compose exec web "
    for line in block.code.splitlines():
        words = shlex.split(line.removeprefix(inside), comments=True)
        if words[0] == "pgscribe":
            yield words[1:]


def run(block: Block) -> list[str]:
    outputs = []
    for arguments in commands(block):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.output
        outputs.append(done.stdout)
    assert outputs
    return outputs


@pytest.fixture
def empty(
    postgres: EmbeddedPostgres,
    database_names: Iterator[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[str]:
    """URL of a project's database without pgscribe, in a folder of one's own."""
    name = next(database_names)
    postgres.create_database(name)
    postgres.bootstrap(name)
    url = postgres.url(database=name)
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", url)
    monkeypatch.chdir(tmp_path)
    yield url
    postgres.drop_database(name)


def test_a_project_is_prepared_and_left_as_it_was(empty: str) -> None:
    with psycopg.connect(empty, autocommit=True) as conn:
        conn.execute("create table public.mine (id int); create function public.mine() returns int"
                     " language sql return 1")  # fmt: skip
        before = objects(conn)
        up_to_date, status = run(BLOCKS["migrate"])
        assert "applied now" in up_to_date
        assert status.startswith("0 of ")
        mine = "insert into supabase_migrations.schema_migrations values"
        conn.execute(f"{mine} ('20261124030303', '{{create table mine (id int)}}', 'mine')")
        assert len(objects(conn)) > len(before) + 30
        conn.execute(BLOCKS["remove"].code.encode())
        assert objects(conn) == before
        left = conn.execute("select name from supabase_migrations.schema_migrations").fetchall()
        assert left == [("mine",)]
        # It may come back.
        assert migrate.migrate(empty) == len(migrate.migrations())


def objects(conn: psycopg.Connection) -> set[tuple[str, str]]:
    """Return what there is in `public`, and the schemas."""
    return {
        (kind, name)
        for kind, name in conn.execute(
            "select 'schema', nspname from pg_namespace where nspname not like 'pg_%'"
            " and nspname <> 'supabase_migrations'"
            " union all select relkind::text, relname from pg_class"
            " where relnamespace = 'public'::regnamespace"
            " union all select 'function', oid::regprocedure::text from pg_proc"
            " where pronamespace = 'public'::regnamespace"
            " union all select 'type', typname from pg_type"
            " where typnamespace = 'public'::regnamespace"
        )
    }


@pytest.mark.skipif(SUPABASE is None, reason="needs the `supabase` CLI on PATH (npm: supabase)")
def test_the_supabase_cli_does_the_same(empty: str) -> None:
    # On a linked project `--remote` is not needed, and TLS is there.
    script = BLOCKS["push"].code.replace(
        "db push --yes",
        f"db push --yes --skip-vault --remote={shlex.quote(empty)}'?sslmode=disable'",
    )
    run(BLOCKS["push"])
    done = subprocess.run(
        ["bash", "-ec", "\n".join(line for line in script.splitlines() if "supabase db" in line)],
        env=os.environ | {"SUPABASE_TELEMETRY_DISABLED": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert migrate.migrate(empty) == 0


def test_operators_and_limits(
    database: str,
    conn: psycopg.Connection,
    user: UUID,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", database)
    monkeypatch.chdir(tmp_path)
    conn.execute("update auth.users set email = 'anna@example.org' where id = %s", (user,))
    assert run(BLOCKS["operators"])[0] == f"{user}  is an operator\n"
    made = run(BLOCKS["operator"])
    assert made[1].startswith("pgs_")
    limits = conn.execute("select max_duration from pgscribe.default_limits").fetchone()
    assert limits == (14400.0,)


def test_keys_are_renewed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    self_hosting.create(REPO / ".env.example", tmp_path / ".env")
    before = dotenv_values(".env")
    run(BLOCKS["renew"])
    now = dotenv_values(".env")
    assert {name for name in now if now[name] != before[name]} == {"SUPABASE_SECRET_KEY"}
    # The table of what may be renewed names nothing that can't be.
    text = (REPO / "docs" / "self-hosting.md").read_text(encoding="utf-8")
    named = {word.strip("`)") for word in text.split() if word.strip("`)") in self_hosting.SECRETS}
    assert {"JWT_KEYS", "JWT_SECRET", "DASHBOARD_PASSWORD", "AUTHENTICATOR_PASSWORD"} <= named


def test_storage_is_prepared(
    monkeypatch: pytest.MonkeyPatch, postgres: EmbeddedPostgres, database: str, tmp_path: Path
) -> None:
    from tests.supabase_storage.server import StandIn, serving
    from tests.supabase_storage.test_setup import TABLES

    name = database.rpartition("/")[2]
    with psycopg.connect(postgres.url(user=SUPERUSER, database=name)) as superuser:
        superuser.execute(TABLES.encode())
        superuser.execute("reset role; grant supabase_storage_admin to postgres")
    monkeypatch.chdir(tmp_path)
    with serving(StandIn()) as server:
        for line in BLOCKS["storage"].code.splitlines():
            if line.startswith("export "):
                for word in shlex.split(line)[1:]:
                    monkeypatch.setenv(*word.split("=", 1))
        monkeypatch.setenv("PGSCRIBE_DATABASE_URL", database)
        monkeypatch.setenv("PGSCRIBE_SUPABASE_URL", server.url)
        monkeypatch.setenv("PGSCRIBE_SUPABASE_SECRET_KEY", server.secret_key)
        try:
            (said,) = run(BLOCKS["storage"])
        finally:
            with psycopg.connect(postgres.url(user=SUPERUSER)) as superuser:
                superuser.execute("revoke supabase_storage_admin from postgres")
    assert "delete     gone" in said
    assert server.buckets["audio"].file_size_limit == 50_000_000
