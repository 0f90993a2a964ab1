"""The command line, as its users call it."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import jwt
import psycopg
import pytest
from click.testing import CliRunner, Result

from db import migrate
from jobs import __version__
from jobs.cli import common, main, operating
from jobs.settings import Settings
from jobs.tokens import issue_token
from tests.live import answer, proxied, serve
from web.app import create_app

Run = Callable[..., Result]
ROOT = Path(migrate.__file__).parents[1]


@pytest.fixture
def pgscribe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    return run


@pytest.fixture
def configured(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("PGSCRIBE_JWT_SECRET", settings.require_jwt_secret())
    return settings


def _all_commands() -> Iterator[list[str]]:
    for name, command in main.commands.items():
        yield [name]
        yield from ([name, part] for part in getattr(command, "commands", ()))


@pytest.mark.parametrize("command", [*_all_commands()], ids=" ".join)
def test_help_teaches_by_an_example(pgscribe: Run, command: list[str]) -> None:
    result = pgscribe(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output
    assert f"\n    pgscribe {' '.join(command)}" in result.output
    assert "\\b" not in result.output


def test_the_help_has_each_command_on_one_line_of_one_section(pgscribe: Run) -> None:
    lines = pgscribe("--help").output.splitlines()
    listed = lines[lines.index("Start here:") :]
    names = [line.split()[0] for line in listed if line.startswith("  ")]
    assert sorted(names) == sorted(main.commands)


# Start-up is measured by what is imported: that is most of it, and the same on each machine.
DATABASE = frozenset(["psycopg", "psycopg_pool", "procrastinate"])
HEAVY = DATABASE | {"asyncio", "cryptography", "httpx", "httpx2", "jwt", "modal", "numpy"}
HEAVY |= {"pydantic", "pydantic_settings", "starlette", "supabase", "uvicorn"}
FEW = DATABASE | {"modal", "starlette", "supabase", "uvicorn"}


@pytest.mark.parametrize(
    ("arguments", "heavy", "said"),
    [
        (["--version"], HEAVY, __version__),
        (["--help"], HEAVY, "Usage: "),
        (["deploy", "--help"], HEAVY, "Usage: "),
        (["webhooks", "--help"], HEAVY, "Usage: "),
        (["transcribe", "missing.mp3"], HEAVY, "does not exist"),
        (["transcribe", __file__], FEW, "PGSCRIBE_TOKEN"),
        (["token", "--user", str(UUID(int=1))], FEW | {"httpx2"}, "PGSCRIBE_JWT_SECRET"),
        (["make-keys", "--missing"], FEW | {"httpx2", "pydantic_settings"}, "There is no .env"),
        (["migrate", "--export", "files"], FEW - DATABASE | {"pydantic"}, "files written"),
    ],
)
def test_what_needs_no_database_starts_at_once(
    arguments: list[str], heavy: frozenset[str], said: str, tmp_path: Path
) -> None:
    code = (
        "import atexit, sys; from jobs.cli import main;"
        f"atexit.register(lambda: print('heavy:', *sorted({set(heavy)} & set(sys.modules))));"
        f"main({arguments})"
    )
    environment = {name: value for name, value in os.environ.items() if "PGSCRIBE" not in name}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert said in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:", "imported, though it needs none of these"


def test_missing_settings_are_named(pgscribe: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGSCRIBE_DATABASE_URL", raising=False)
    for command in ("web", "worker", "migrate", "jobs"):
        result = pgscribe(command)
        assert result.exit_code == 1
        assert "PGSCRIBE_DATABASE_URL" in result.output
        assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["migrate", "jobs"])
def test_an_unreachable_database_is_one_plain_sentence(
    pgscribe: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", "postgresql://postgres:hidden@127.0.0.1:1/x")
    result = pgscribe(command)
    assert result.exit_code == 1
    assert "out of reach" in result.output
    assert "hidden" not in result.output


def test_a_database_that_is_silent_is_not_waited_for_forever(
    pgscribe: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (common, operating, migrate):
        monkeypatch.setattr(module, "CONNECT_TIMEOUT", 2)  # psycopg takes no less
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://postgres@127.0.0.1:{silent.getsockname()[1]}/x"
        monkeypatch.setenv("PGSCRIBE_DATABASE_URL", url)
        for command in ("jobs", "keys list", "migrate"):
            result = pgscribe(*command.split())
            assert (result.exit_code, result.stdout) == (1, ""), command
            assert "The database is out of reach: connection timeout expired" in result.stderr


@pytest.mark.parametrize("command", ["jobs", "keys list", "worker"])
def test_what_names_no_database_is_no_reason_to_try_again(
    pgscribe: Run, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", "a-hidden-word")
    result = pgscribe(*command.split())
    assert (result.exit_code, "hidden" in result.output) == (1, False)
    assert "PGSCRIBE_DATABASE_URL: can't be read" in result.output


@pytest.mark.usefixtures("configured")
def test_a_database_that_lacks_something_is_to_be_migrated(
    pgscribe: Run, conn: psycopg.Connection, user: UUID
) -> None:
    conn.execute("alter table public.processing_jobs rename to elsewhere")
    conn.execute("alter function public.pause_owner rename to stop_owner")
    conn.execute("alter schema pgscribe rename to elsewhere")
    for command in ("jobs", f"pause --owner {user}", "limit --default", "keys list"):
        result = pgscribe(*command.split())
        assert (result.exit_code, result.stdout) == (1, ""), command
        assert "run `pgscribe migrate`" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("configured")
def test_operators_pause_and_resume(pgscribe: Run, conn: psycopg.Connection, user: UUID) -> None:
    paused = "select queue_name from pgscribe.queue_settings where paused_at is not null"
    assert pgscribe("pause").output == "queue transcription is paused; what runs goes on\n"
    assert conn.execute(paused).fetchall() == [("transcription",)]
    assert pgscribe("resume").output == "queue transcription is not paused\n"
    assert conn.execute(paused).fetchall() == []
    assert pgscribe("pause", "--owner", str(user)).output.startswith(f"owner {user} is paused")
    unknown = "00000000-0000-4000-8000-00000000000f"
    for arguments, said in (
        (["--queue", "jobs"], "Give one of maintenance, transcription, webhooks"),
        (["--owner", str(user), "--owner", unknown], f"there is no user {unknown}"),
        (["--owner", str(user), "--queue", "webhooks"], "either --owner or --queue"),
    ):
        result = pgscribe("resume", *arguments)
        assert (result.exit_code > 0, result.stdout) == (True, "")
        assert said in result.stderr
    owners = "select paused_at is not null from pgscribe.owner_limits"
    assert conn.execute(owners).fetchall() == [(True,)], "resumed with one that is unknown"


@pytest.mark.usefixtures("configured")
def test_one_job_or_key_that_is_not_there_is_no_reason_to_leave_out_others(
    pgscribe: Run, conn: psycopg.Connection, user: UUID
) -> None:
    insert = "insert into processing_jobs (user_id, file_path) values (%s, 'a') returning id"
    (job,) = conn.execute(insert, (user,)).fetchone() or ()
    pgscribe("keys", "create", "k", "--any-user")
    (key,) = json.loads(pgscribe("keys", "list", "--json").stdout)
    for command, there, now in (
        ("cancel", job, "cancelled"),
        ("keys revoke", key["id"], "revoked"),
    ):
        missing = uuid4()
        result = pgscribe(*command.split(), str(missing), str(there))
        assert (result.exit_code, result.stdout) == (1, f"{there}  {now}\n")
        assert result.stderr.startswith(f"{missing}  There is no such")
        assert "not yours" not in result.stderr


@pytest.mark.usefixtures("configured")
def test_what_is_not_meant_is_said_at_the_start(
    conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = migrate.migrations()[-1]
    conn.execute(
        "delete from supabase_migrations.schema_migrations where version = %s", (last.version,)
    )
    monkeypatch.setenv("PGSCRIBE_WORKER_CONCURENCY", "3")
    status, said, port = _serve_where_somebody_listens()
    assert status == 3
    assert "Did you mean PGSCRIBE_WORKER_CONCURRENCY" in said
    assert f"1 of {len(migrate.migrations())} migrations are missing" in said
    assert f"Can't listen on 127.0.0.1 port {port}: give another --port" in said


@pytest.mark.usefixtures("configured")
def test_a_ledger_that_can_not_be_read_now_holds_no_start_up(conn: psycopg.Connection) -> None:
    with conn.transaction():
        conn.execute("lock table supabase_migrations.schema_migrations in access exclusive mode")
        status, said, _ = _serve_where_somebody_listens()
    assert (status, "migrations" in said) == (3, False)


def _serve_where_somebody_listens() -> tuple[int, str, int]:
    """Start a web server that has to give up; return its exit status, its log and the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "web", "--port", str(port)],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
        )
    return done.returncode, done.stderr, port


@pytest.mark.usefixtures("configured")
def test_migrate(pgscribe: Run, conn: psycopg.Connection, tmp_path: Path) -> None:
    total = len(migrate.migrations())
    assert f"0 of {total} migrations are missing" in pgscribe("migrate", "--status").output
    lost = next(found for found in migrate.migrations() if found.name == "traces")
    conn.execute(
        "delete from supabase_migrations.schema_migrations where version = %s", (lost.version,)
    )
    status = pgscribe("migrate", "--status")
    assert status.exit_code == 1
    assert f"missing  {lost.filename}" in status.output
    refused = pgscribe("migrate")
    assert (refused.exit_code, type(refused.exception)) == (1, SystemExit)
    assert f"{lost.filename} was not applied, and nothing of it is left" in refused.output
    assert f"migration repair --status applied {lost.version}`" in refused.output
    exported = pgscribe("migrate", "--export", str(tmp_path / "supabase"))
    assert exported.exit_code == 0
    assert len(list((tmp_path / "supabase").glob("*.sql"))) == total


def test_token(pgscribe: Run, configured: Settings) -> None:
    user = uuid4()
    result = pgscribe("token", "--user", str(user), "--lifetime", "60")
    claims = jwt.decode(
        result.output.strip(),
        configured.require_jwt_secret(),
        algorithms=["HS256"],
        audience="authenticated",
    )
    assert (claims["sub"], claims["exp"] - claims["iat"]) == (str(user), 60)


@pytest.mark.usefixtures("configured")
def test_jobs_shows_every_owners(pgscribe: Run, conn: psycopg.Connection, user: UUID) -> None:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'a/b.mp3') returning id",
        (user,),
    ).fetchone()
    assert row is not None
    listed = pgscribe("jobs", "--status", "queued").output
    assert str(row[0]) in listed
    assert "a/b.mp3" in listed
    (as_json,) = json.loads(pgscribe("jobs", "--json").output)
    assert (as_json["id"], as_json["status"]) == (str(row[0]), "queued")
    none = pgscribe("jobs", "--status", "failed")
    assert (none.exit_code, none.stdout, none.stderr) == (0, "", "No job is failed\n")
    shown = json.loads(pgscribe("jobs", str(row[0])).output)
    assert (shown["user_id"], shown["status"]) == (str(user), "queued")
    unknown = pgscribe("jobs", str(uuid4()))
    assert (unknown.exit_code, "no such job" in unknown.output) == (1, True)
    assert "'queued', 'processing'" in pgscribe("jobs", "--status", "done").output


def test_what_was_submitted_before_a_refusal_is_named(
    pgscribe: Run,
    configured: Settings,
    conn: psycopg.Connection,
    user: UUID,
    sample: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGSCRIBE_TOKEN", issue_token(configured, user, lifetime=60))
    with serve(create_app(configured)) as url, proxied(url) as proxy:
        proxy.faults = [("POST", None), ("POST", None), ("POST", answer(401, b"{}"))]
        monkeypatch.setenv("PGSCRIBE_URL", proxy.url)
        result = pgscribe("transcribe", str(sample), str(sample))
    ((job,),) = conn.execute("select id from processing_jobs").fetchall()
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"What was submitted goes on: {job}\nError: ")
    assert "`pgscribe token` makes a new one" in result.stderr


def test_transcribe_without_a_server_says_how_to_start_one(
    pgscribe: Run, monkeypatch: pytest.MonkeyPatch, sample: Path
) -> None:
    monkeypatch.setenv("PGSCRIBE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("PGSCRIBE_TOKEN", "none")
    result = pgscribe("transcribe", str(sample))
    assert result.exit_code == 1
    assert "pgscribe dev" in result.output
