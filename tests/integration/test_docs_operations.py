"""What the documentation tells operators to run: SQL as they are, and pgscribe's own commands."""

import configparser
import json
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from click.testing import CliRunner

from jobs.cli import main
from jobs.doctor.all import CHECKS
from jobs.settings import Settings
from tests.command_lines import commands, parse
from tests.doc_blocks import DOCS, JOB, Block, in_full, runs
from tests.integration.test_docs_sql import last_rows, make_job

SQL = runs("rows")
COMMANDS = runs("cli")
UNITS = runs("unit")
REPORTS = runs("report")
SIGN_OFF = 5.0  # seconds that a worker takes to tell the database that it ends
ADDRESS = "anna@example.org", "prometheus@example.org"

Seeds = dict[str, str]


@pytest.fixture
def pgscribe(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("PGSCRIBE_JWT_SECRET", settings.require_jwt_secret())

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(main, arguments)
        allowed = {0, 1} if arguments[0] == "doctor" else {0}
        assert done.exit_code in allowed, (arguments, done.output)
        assert "Traceback" not in done.output
        return done.stdout.strip()

    return run


@pytest.fixture
def seeds(conn: psycopg.Connection, user: UUID, pgscribe: Callable[..., str]) -> Seeds:
    """A database with a job in each state, an endpoint and a key."""
    for address in ADDRESS:
        conn.execute(
            "insert into auth.users (id, email) values (gen_random_uuid(), %s)", (address,)
        )
    make_job(conn, user, "queued")
    make_job(conn, user, "completed")
    failed = make_job(conn, user, "queued")
    for status in ("doing", "failed"):
        conn.execute(
            "update processing_jobs set error_code = 'call_timeout', error = 'It took too long'"
            " where id = %s and status = 'processing'", (failed,),
        )  # fmt: skip
        conn.execute(
            "update procrastinate.procrastinate_jobs set status = %s where id ="
            " (select job_id::bigint from processing_jobs where id = %s)", (status, failed),
        )  # fmt: skip
    pgscribe("keys", "create", "nightly", "--user", str(user))
    pgscribe("webhooks", "create", "https://example.org/hook", "--user", str(user))
    return {
        "$USER_ID": str(user),
        "$KEY_ID": pgscribe("keys", "list").split()[0],
        "$ENDPOINT_ID": pgscribe("webhooks", "endpoints").split()[0],
        JOB: make_job(conn, user, "processing"),
    }


def test_statements_and_commands_work(
    conn: psycopg.Connection, seeds: Seeds, pgscribe: Callable[..., str]
) -> None:
    for block in SQL:
        assert len(rows(conn, block, seeds)) == int(block.options["rows"]), (block.name, block.code)
    for block in COMMANDS:
        for program, *arguments in commands(in_full(block.code)):
            if program == "true":  # … || true
                continue
            assert program == "pgscribe", block.name
            if arguments[0] == "doctor" and "--only" not in arguments:
                parse(main, program, arguments)  # `pgscribe dev` is examined as a whole
            else:
                pgscribe(*(seeds.get(word, word) for word in arguments))


def rows(conn: psycopg.Connection, block: Block, seeds: Seeds) -> list[dict[str, object]]:
    """Run a block and undo it."""
    code = in_full(block.code).replace(JOB, seeds[JOB])
    with conn.transaction(force_rollback=True), conn.cursor() as cursor:
        cursor.execute(code.encode())
        return last_rows(cursor)  # type: ignore[arg-type]


def test_the_blocks_are_found() -> None:
    assert len(SQL) >= 10
    assert len(COMMANDS) >= 12


def test_the_unit_lets_a_worker_drain() -> None:
    (block,) = UNITS
    unit = configparser.ConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(block.code)
    service = unit["Service"]
    name, seconds = service["Environment"].split("=")
    assert name == "PGSCRIBE_SHUTDOWN_TIMEOUT"
    assert float(service["TimeoutStopSec"]) >= float(seconds) + SIGN_OFF
    assert service["KillMode"] == "mixed"


def test_the_report_is_as_documented(pgscribe: Callable[..., str]) -> None:
    (block,) = REPORTS
    documented = json.loads(block.code)
    report = json.loads(pgscribe("doctor", "--json", "--only", "settings"))
    assert set(report) == set(documented)
    assert report["format"] == documented["format"]
    assert set(report["checks"][0]) == set(documented["checks"][0])
    table = (DOCS / "doctor.md").read_text(encoding="utf-8")
    for check in CHECKS:
        assert f"`{check.id}`" in table, "each check is in the table"


def test_the_runbooks_list_has_each_of_its_sections() -> None:
    text = (DOCS / "runbook.md").read_text(encoding="utf-8")
    headings = {
        line.removeprefix("## ").lower().replace(" ", "-").replace(",", "")
        for line in text.splitlines()
        if line.startswith("## ")
    }
    linked = {part.split(")")[0] for part in text.split("](#")[1:]}
    assert linked == headings
