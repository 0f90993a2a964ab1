"""The command line, as its users call it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from uuid import UUID, uuid4

import jwt
import psycopg
import pytest
from click.testing import CliRunner, Result

from db import migrate
from jobs import __version__
from jobs.cli import main
from jobs.cli.webhooks import webhooks
from jobs.settings import Settings

Run = Callable[..., Result]


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


@pytest.mark.parametrize(
    "name", ["", *main.commands, *(f"webhooks {name}" for name in webhooks.commands)]
)
def test_help_teaches(pgscribe: Run, name: str) -> None:
    result = pgscribe(*name.split(), "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.output
    assert len(result.output.splitlines()) > 5
    assert "\\b" not in result.output


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["deploy", "--help"], ["webhooks", "--help"]]
)
def test_help_and_version_start_nothing_heavy(arguments: list[str]) -> None:
    code = (
        f"import sys; from jobs.cli import main; main({arguments}, standalone_mode=False);"
        "heavy = {'modal', 'psycopg', 'pydantic', 'procrastinate', 'starlette', 'numpy', 'httpx2'};"
        "sys.exit(str(heavy & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (__version__ if arguments == ["--version"] else "Usage: ") in done.stdout
    assert done.stderr.strip() == "", "imported at start, though this needs none of it"


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


@pytest.mark.usefixtures("configured")
def test_migrate(pgscribe: Run, conn: psycopg.Connection, tmp_path: Path) -> None:
    total = len(migrate.migrations())
    assert f"0 of {total} migrations are missing" in pgscribe("migrate", "--status").output
    last = migrate.migrations()[-1]
    conn.execute(
        "delete from supabase_migrations.schema_migrations where version = %s", (last.version,)
    )
    status = pgscribe("migrate", "--status")
    assert status.exit_code == 1
    assert f"missing  {last.filename}" in status.output
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
    assert pgscribe("jobs", "--status", "failed").output == ""
    shown = json.loads(pgscribe("jobs", str(row[0])).output)
    assert (shown["user_id"], shown["status"]) == (str(user), "queued")
    unknown = pgscribe("jobs", str(uuid4()))
    assert (unknown.exit_code, "no such job" in unknown.output) == (1, True)
    assert "queued, processing" in pgscribe("jobs", "--status", "done").output


def test_transcribe_without_a_server_says_how_to_start_one(
    pgscribe: Run, monkeypatch: pytest.MonkeyPatch, sample: Path
) -> None:
    monkeypatch.setenv("PGSCRIBE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("PGSCRIBE_TOKEN", "none")
    result = pgscribe("transcribe", str(sample))
    assert result.exit_code == 1
    assert "pgscribe dev" in result.output
