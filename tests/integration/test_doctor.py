"""`pgscribe doctor` on set-ups that are broken: each time the fault is named, and no secret is."""

import asyncio
import json
import os
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any
from uuid import UUID

import jwt
import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from db import migrate, schema
from db.embedded import EmbeddedPostgres
from jobs.cli import main
from jobs.doctor import database as doctor_database
from jobs.doctor import queue, services
from jobs.doctor.all import CHECKS
from jobs.doctor.checks import Check, Context, Finding, fail, ok, together, warn
from jobs.doctor.database import check_database
from jobs.doctor.environment import known_variables
from jobs.doctor.examination import examine
from jobs.doctor.network import is_near
from jobs.settings import ServerAddress, Settings
from jobs.sql import DOCTOR
from tests import jwks_server, ports
from tests.faults.proxy import Proxy
from tests.streams import Work, until
from tests.supabase_storage.server import Bucket, StandIn, serving

SECRET = "e2b7c1d4a90f4d6c8b3a5f7e1d2c4b6a"
PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/bin")
Report = dict[str, dict[str, Any]]
Doctor = Callable[..., Report]


@pytest.fixture
def doctor(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """Run the command with these settings besides those of a healthy set-up."""
    monkeypatch.chdir(tmp_path)
    healthy = {"DATABASE_URL": database, "JWT_SECRET": SECRET}

    def run(*arguments: str, **settings: str) -> Report:
        environment = {f"PGSCRIBE_{name}": value for name, value in (healthy | settings).items()}
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            done = CliRunner().invoke(main, ["doctor", "--json", *arguments])
        assert done.exit_code in {0, 1}, done.output
        report = json.loads(done.stdout)
        assert (report["status"] == "fail") == (done.exit_code == 1)
        passwords = [psycopg.conninfo.conninfo_to_dict(database)["password"], SECRET]
        shown = done.output + done.stderr
        assert not [one for one in passwords if str(one) in shown], "no secret is shown"
        assert "Traceback" not in shown
        return {check["id"]: check for check in report["checks"]}

    return run


def problem(report: Report, check: str, seen: str, status: str = "fail") -> str:
    """Return how to mend what a check has seen."""
    found = report[check]
    assert (found["status"], seen in found["seen"]) == (status, True), found
    assert found["mend"]
    return str(found["mend"])


def with_parts(url: str, **parts: str | int) -> str:
    return psycopg.conninfo.make_conninfo(url, **parts)


@pytest.fixture
def port() -> Iterator[int]:
    """A port where nothing listens."""
    with ports.reserved() as port:
        yield port


# The command --------------------------------------------------------------------------------------


def test_only_what_is_wanted_is_looked_at_and_what_it_needs(doctor: Doctor) -> None:
    assert [*doctor("--only", "schema")] == ["settings", "database", "migrations", "schema"]
    report = doctor("--only", "clock,role", "--skip", "database")
    assert [*report] == ["settings", "role", "clock"]
    assert {check["status"] for check in report.values()} == {"ok"}
    assert set(report["clock"]) == {"id", "title", "status", "seen", "mend", "seconds"}


def test_the_table_and_the_exit_status(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        settings = {"DATABASE_URL": database, "JWT_SECRET": SECRET, "RATE_LIMITT": "1"}
        environment = {f"PGSCRIBE_{name}": value for name, value in settings.items()}
        done = CliRunner().invoke(main, ["doctor", *arguments], env=environment)
        return done.exit_code, done.output

    status, shown = run("--only", "settings,role")
    assert status == 0
    assert shown.splitlines() == [
        "warn     settings  PGSCRIBE_RATE_LIMITT is no setting and is not read",
        "                   → Did you mean PGSCRIBE_RATE_LIMIT by PGSCRIBE_RATE_LIMITT?",
        "ok       database  " + shown.splitlines()[2].removeprefix("ok       database  "),
        "ok       role      postgres may act as users, and sees all jobs",
        "",
        "2 ok, 1 warn",
    ]
    assert run("--only", "settings", "--strict")[0] == 1
    assert run("--only", "nothing")[0] == 2
    assert run("--skip", "databse")[0] == 2


@pytest.mark.anyio
async def test_whatever_hangs_or_breaks_is_a_finding_and_the_rest_goes_on() -> None:
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        url = f"postgresql://postgres:{SECRET}@127.0.0.1:{silent.getsockname()[1]}/postgres"
        context = Context(Settings.load(database_url=url))

        async def breaks(_: Context) -> Finding:
            raise ValueError(f"with {SECRET} in it")

        async def works(_: Context) -> Finding:
            return ok("fine")

        checks = [
            Check("database", "", check_database, limit=0.3),
            Check("other", "", works, ("database",)),
            Check("broken", "", breaks),
            Check("works", "", works),
        ]
        shown: list[str] = []
        results = await examine(checks, context, lambda result: shown.append(result.id))
    assert time.monotonic() - begun < 5
    assert shown == ["database", "other", "broken", "works"]
    assert [result.status for result in results] == ["fail", "skipped", "fail", "ok"]
    assert "no answer within 0.3 s" in results[0].seen
    assert results[2].seen == "ValueError: with *** in it"


@pytest.mark.anyio
async def test_a_database_that_falls_silent_is_a_finding(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_database, "LIMIT", 1.0)
    parts = psycopg.conninfo.conninfo_to_dict(database)
    with Proxy(int(str(parts["port"]))) as proxy:

        async def asks(context: Context) -> Finding:
            async with doctor_database.connected(context) as conn:
                await asyncio.to_thread(proxy.swallow)
                return ok(str(await doctor_database.one(conn, DOCTOR["now"])))

        context = Context(Settings.load(database_url=proxy.url(database)))
        (result,) = await examine([Check("silent", "", asks)], context, lambda _: None)
    assert (result.status, "did not answer" in result.seen) == ("fail", True), result
    assert result.seconds < 5


def test_ids_are_unique_and_what_a_check_needs_comes_before_it() -> None:
    ids = [check.id for check in CHECKS]
    assert len({*ids}) == len(ids)
    for number, check in enumerate(CHECKS):
        assert {*check.needs} <= {*ids[:number]}
        assert check.title


# Settings -----------------------------------------------------------------------------------------


def test_settings_that_cannot_be_meant_are_named(doctor: Doctor) -> None:
    only = ("--only", "settings")
    report = doctor(*only, DATABASE_POOL_SIZ="5", WHATEVER_THIS_IS="x")
    mend = problem(report, "settings", "PGSCRIBE_DATABASE_POOL_SIZ is no setting", "warn")
    assert "Did you mean PGSCRIBE_DATABASE_POOL_SIZE" in mend
    assert "Remove PGSCRIBE_WHATEVER_THIS_IS." in mend
    report = doctor(*only, WEB_SERVICE_HOST="10.0.0.7", WEB_PORT_80_TCP_ADDR="10.0.0.7")
    assert "WEB_" not in report["settings"]["seen"], "set by Kubernetes, for a service pgscribe-web"
    report = doctor(WORKER_CONCURRENCY="lots")
    problem(report, "settings", "PGSCRIBE_WORKER_CONCURRENCY")
    assert {check["status"] for name, check in report.items() if name != "settings"} == {"skipped"}
    problem(doctor(*only, STORAGE="supabase"), "settings", "PGSCRIBE_SUPABASE_SECRET_KEY")
    problem(doctor(*only, COMPUTE="modal"), "settings", "Modal has no access to the folder")
    problem(
        doctor(*only, COMPUTE="modal", PUBLIC_URL="http://localhost:8000"),
        "settings", "PGSCRIBE_PUBLIC_URL is of this machine",
    )  # fmt: skip
    project = {"SUPABASE_URL": "http://project.example.org"}
    problem(
        doctor(*only, **project, SUPABASE_PUBLISHABLE_KEY="sb_secret_abc"),
        "settings", "is a secret key, which may do anything",
    )  # fmt: skip
    key = jwt.encode({"role": "anon"}, SECRET, "HS256")
    report = doctor(*only, **project, SUPABASE_SECRET_KEY=key, JWT_ISSUER="https://other.org")
    problem(report, "settings", "is a publishable key")
    assert "http://" in report["settings"]["seen"]
    assert "PGSCRIBE_JWT_ISSUER is not of the project" in report["settings"]["seen"]
    assert "audio lies in a folder" in report["settings"]["seen"]
    problem(doctor(*only, WEBHOOK_NETWORKS="0.0.0.0/0"), "settings", "users reach all", "warn")
    problem(
        doctor(*only, SUPABASE_PUBLISHABLE_KEY="sb_publishable_x"),
        "settings", "without PGSCRIBE_SUPABASE_URL",
    )  # fmt: skip


def test_a_misspelt_prefix_is_noticed(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSCRIPE_STORAGE_DIR", "/data")
    report = doctor("--only", "settings")
    assert "PGSCRIBE_STORAGE_DIR" in problem(report, "settings", "PGSCRIPE_STORAGE_DIR", "warn")


def test_what_a_line_without_an_equals_sign_holds_is_not_shown(
    doctor: Doctor, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(f"PGSCRIBE_JWT_SECRET:{SECRET[:-2]}==\nPGSCRIBE_TOKEN\n")
    report = doctor("--only", "settings")
    mend = problem(report, "settings", "begins with PGSCRIBE_JWT_SECRET is not read", "warn")
    assert "NAME=value" in mend
    assert SECRET[:-2].upper() not in report["settings"]["seen"]


def test_every_setting_is_known() -> None:
    assert {"PGSCRIBE_DATABASE_URL", "PGSCRIBE_TOKEN", "PGSCRIBE_MODAL_GPU"} <= known_variables()


# Database -----------------------------------------------------------------------------------------


def test_what_keeps_us_from_the_database_is_told_apart(
    doctor: Doctor, database: str, port: int
) -> None:
    def seen(url: str) -> tuple[str, str]:
        report = doctor("--only", "database,queue", DATABASE_URL=url)
        assert report["queue"]["status"] == "skipped"
        found = report["database"]
        assert found["status"] == "fail"
        return found["seen"], found["mend"]

    refused, _ = seen(with_parts(database, password="not-it"))
    assert "refuses user or password" in refused
    assert "not-it" not in refused
    assert "not this database" in seen(with_parts(database, dbname="nowhere"))[0]
    closed, mend = seen(with_parts(database, port=port))
    assert "nothing listens at 127.0.0.1" in closed
    assert "right host and port" in mend
    assert "name db.nowhere.invalid is not found" in seen(
        with_parts(database, host="db.nowhere.invalid")
    )[0]  # fmt: skip
    assert "no URL of a database" in seen("postgresql://postgres:pass word@/x?y")[0]
    assert "URL is empty" in seen("")[0]
    assert "no server listens there" in seen("postgresql:///x?host=/nowhere")[0]
    for password in ("5432/hunter2", "hun/ter2@hunter2"):
        shown = seen(f"postgresql://postgres:{password}@127.0.0.1:1/postgres")
        assert "@ as %40" in shown[1]
        assert "ter2" not in "".join(shown)
    report = doctor("--only", "settings", DATABASE_URL="postgresql://postgres:hun@ter2@127.0.0.1/x")
    problem(report, "settings", "write those of the password as %40")
    assert "ter2" not in str(report)
    assert "no encrypted connection" in seen(with_parts(database, sslmode="require"))[0]
    with agreeing_to_tls() as tls:
        url = with_parts(database, port=tls, sslmode="verify-full", sslrootcert="/nowhere")
        assert "sslrootcert" in seen(url)[1]


@contextmanager
def agreeing_to_tls() -> Iterator[int]:
    """Yield the port of a server that says yes to each client that asks for TLS."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                if self.request.recv(8):
                    self.request.sendall(b"S")
                    self.request.recv(1)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("host", "near"),
    [
        ("127.0.0.1", True), ("::1", True), ("localhost", True), ("/run/postgresql", True),
        ("db", True), ("db.abc.supabase.co", False), ("10.0.0.5", False), ("2001:db8::1", False),
    ],
)  # fmt: skip
def test_what_leaves_this_machine_is_known(host: str, *, near: bool) -> None:
    assert is_near(host) is near


def test_a_role_that_may_too_little_is_named(
    doctor: Doctor, database: str, postgres: EmbeddedPostgres
) -> None:
    with psycopg.connect(postgres.url(user="supabase_admin"), autocommit=True) as conn:
        conn.execute("create role somebody login password 'else-where'")
        try:
            url = with_parts(database, user="somebody", password="else-where")
            report = doctor("--only", "role,migrations", DATABASE_URL=url)
        finally:
            conn.execute("drop role somebody")
    problem(report, "role", "may not act as authenticated or service_role")
    assert "under row level security" in report["role"]["seen"]
    assert "Connect as `postgres`" in problem(report, "migrations", "role may not do what pgscribe")


def test_limits_of_the_server_are_compared_with_what_we_take(
    doctor: Doctor, conn: psycopg.Connection
) -> None:
    report = doctor("--only", "capacity", DATABASE_POOL_SIZE="500")
    problem(report, "capacity", "2 processes may open 1002 connections", "warn")
    name = sql.Identifier(conn.info.dbname)
    conn.execute(sql.SQL("alter database {} set statement_timeout = '3s'").format(name))
    mend = problem(doctor("--only", "capacity"), "capacity", "statement_timeout is 3s", "warn")
    assert "alter role postgres set statement_timeout" in mend


def test_what_keeps_dead_rows_and_wal_is_named(
    doctor: Doctor, conn: psycopg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = f"forgotten_{conn.info.backend_pid}"
    only = "--only", "transactions"
    with psycopg.connect(database, application_name="a report") as reader:
        reader.execute("select 1")
        conn.execute("select pg_create_physical_replication_slot(%s, true)", (slot,))
        try:
            assert doctor(*only)["transactions"]["status"] == "ok"
            monkeypatch.setattr(doctor_database, "LONG_TRANSACTION", 0.0)
            monkeypatch.setattr(doctor_database, "MOST_WAL", -1)
            found = doctor(*only)
        finally:
            conn.execute("select pg_drop_replication_slot(%s)", (slot,))
        here = f"process {reader.info.backend_pid} (a report, idle in transaction)"
        mend = problem(found, "transactions", here, "warn")
        assert f"nobody reads from replication slot {slot}" in found["transactions"]["seen"]
        assert "pg_terminate_backend(process)" in mend
        assert f"pg_drop_replication_slot('{slot}')" in mend
    assert doctor(*only)["transactions"]["seen"] == "none is open"


def test_a_ledger_that_is_behind_ahead_or_otherwise_is_named(
    doctor: Doctor, conn: psycopg.Connection, postgres: EmbeddedPostgres,
    database_names: Iterator[str],
) -> None:  # fmt: skip
    newest = migrate.migrations()[-1]
    ledger = "supabase_migrations.schema_migrations"
    conn.execute(f"delete from {ledger} where version = '{newest.version}'".encode())
    conn.execute(f"update {ledger} set statements = array[rtrim(statements[1], E';\n')]".encode())
    report = doctor("--only", "migrations,queue")
    assert "another text" not in report["migrations"]["seen"], "the Supabase CLI records it so"
    mend = problem(report, "migrations", f"1 migrations are missing: {newest.filename}")
    assert "pgscribe migrate" in mend
    assert report["queue"]["status"] == "skipped"
    conn.execute(
        f"insert into {ledger} values ('29990101000000', '{{alter table pgscribe.x}}', 'next'),"
        " ('29990101000001', '{create table mine ()}', 'of the project itself'),"
        f" ('{newest.version}', '{{select 1}}', 'otherwise')".encode()
    )
    report = doctor("--only", "migrations,schema")
    mend = problem(report, "migrations", "does not know: 29990101000000_next;", "warn")
    assert f"another text than they have here: {newest.filename}" in report["migrations"]["seen"]
    assert "Upgrade this machine's pgscribe" in mend
    assert (report["schema"]["status"], report["schema"]["seen"][:26]) == (
        "skipped", "the database is of a newer",
    )  # fmt: skip
    name = next(database_names)
    postgres.create_database(name)
    report = doctor("--only", "migrations", DATABASE_URL=postgres.url(database=name))
    problem(report, "migrations", "has not been migrated")
    postgres.drop_database(name)


def test_the_lines_are_what_the_migrations_make(conn: psycopg.Connection) -> None:
    found = schema.found(schema.look(conn))
    assert found == schema.expected(), "run: python -m db.schema"


CHANGES = {
    "alter table processing_jobs disable trigger defer_processing_jobs": (
        "triggers are disabled or gone: defer_processing_jobs on public.processing_jobs",
        "alter table public.processing_jobs enable trigger defer_processing_jobs;",
    ),
    "alter table processing_job_chunks disable row level security": (
        "row level security is off on public.processing_job_chunks",
        "alter table public.processing_job_chunks enable row level security;",
    ),
    "grant select (audio_url), update on processing_jobs to anon": (
        (
            "more is allowed than was: public.processing_jobs anon: update, "
            "public.processing_jobs.audio_url anon: select"
        ),
        (
            "revoke update on public.processing_jobs from anon; "
            "revoke select (audio_url) on public.processing_jobs from anon;"
        ),
    ),
    "create policy everybody on processing_jobs for select using (true)": (
        "public.processing_jobs everybody: permissive for select to public",
        'drop policy "everybody" on public.processing_jobs;',
    ),
    "revoke execute on function cancel_processing_job from authenticated": (
        "less is allowed than was: public.cancel_processing_job(uuid) authenticated: execute",
        "Grant it again",
    ),
    'alter policy "Owners see their jobs" on processing_jobs using (true)': (
        "policies are not as the migrations made them: Owners see their jobs on public.processing_",
        "run its `create policy` of db/migrations again",
    ),
    "create policy short on processing_jobs as restrictive using (audio_seconds > 1)": (
        "policies restrict what users see: public.processing_jobs short: restrictive for all",
        'drop policy "short" on public.processing_jobs;',
    ),
    "create or replace view queue_health as select * from pgscribe.queue_health();"
    "alter view queue_health reset (security_invoker)": (
        "views are gone, or show others' rows: public.queue_health",
        "alter view public.queue_health set (security_invoker = true);",
    ),
    "alter table webhook_attempts drop constraint webhook_attempts_delivery_id_fkey": (
        "constraints are gone or not valid: webhook_attempts_delivery_id_fkey on public.webhook_at",
        "add it again as db/migrations does",
    ),
    "alter view job_inspection set (security_invoker = on)": None,
    "alter function pgscribe.count_usage(uuid[]) reset search_path": (
        "pgscribe.count_usage(uuid[])",
        "create or replace",
    ),
    "create or replace function pgscribe.is_operator() returns boolean language sql stable"
    " security definer set search_path = pg_catalog, pg_temp as 'select true'": (
        "functions are not as the migrations made them: pgscribe.count_usage(uuid[]), pgscribe.is_",
        "create or replace",
    ),
    "alter publication supabase_realtime drop table processing_jobs": (
        "Supabase Realtime says nothing of changes to public.processing_jobs",
        "alter publication supabase_realtime add table public.processing_jobs;",
    ),
    "drop index processing_jobs_due_idx": (
        "indexes are invalid or gone: processing_jobs_due_idx",
        "Queries get slow",
    ),
    "drop table processing_job_waveforms": (
        "tables are gone: public.processing_job_waveforms",
        "docs/backup.md",
    ),
    "alter table pgscribe.api_keys enable row level security": None,
    "create table mine (); grant all on mine to anon": None,
}


def test_what_somebody_has_changed_in_the_dashboard_is_named(
    doctor: Doctor, conn: psycopg.Connection
) -> None:
    for change in CHANGES:
        conn.execute(change.encode())
    found = doctor("--only", "schema")["schema"]
    assert found["status"] == "fail"
    for seen, mend in filter(None, CHANGES.values()):
        assert seen in found["seen"]
        assert mend in found["mend"]
    assert "mine" not in found["seen"]
    assert "api_keys" not in found["seen"]
    assert "job_inspection" not in found["seen"]
    assert 'drop policy "Owners' not in found["mend"], "a policy of ours is not to be dropped"
    repairs = [part for part in found["mend"].split(";") if "alter table" in part or " on " in part]
    assert len(repairs) >= 5


@contextmanager
def pgbouncer(database: str) -> Iterator[str]:
    """Run a real PgBouncer in transaction mode; yield the URL through it."""
    assert PGBOUNCER is not None
    parts = psycopg.conninfo.conninfo_to_dict(database)
    account: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    with (
        tempfile.TemporaryDirectory() as folder,  # that `nobody` can read: not below tmp_path
        ports.reserved() as port,
    ):
        config = Path(folder, "pgbouncer.ini")
        config.write_text(
            f"[databases]\n* = host=127.0.0.1 port={parts['port']} user={parts['user']}"
            f" password={parts['password']}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"
            f"listen_port = {port}\nauth_type = any\npool_mode = transaction\n"
            "unix_socket_dir =\ndefault_pool_size = 2\nlogfile =\n"
        )
        if account:
            shutil.chown(config, **account)
            Path(folder).chmod(0o711)
        process = subprocess.Popen([PGBOUNCER, str(config)], stderr=subprocess.DEVNULL, **account)
        try:
            until(lambda: process.poll() is not None or answers(port), "PgBouncer answers")
            yield with_parts(database, port=port)
        finally:
            process.terminate()
            process.wait()


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(PGBOUNCER is None, reason="needs PgBouncer (Debian: pgbouncer)")
def test_a_pooler_in_transaction_mode_is_recognised_by_what_it_loses(
    doctor: Doctor, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PGBOUNCER is not None
    monkeypatch.setattr(doctor_database, "LISTEN_TIMEOUT", 0.5)
    with pgbouncer(database) as url:
        report = doctor("--only", "pooler,schema,clock", DATABASE_URL=url)
    mend = problem(report, "pooler", "LISTEN does not work", "warn")
    version = re.search(r" 1\.(\d+)", subprocess.check_output([PGBOUNCER, "--version"], text=True))
    assert version is not None
    keeps_prepared = int(version[1]) >= 24
    assert ("prepared statements are lost" in report["pooler"]["seen"]) is not keeps_prepared
    assert "session pooler (port 5432)" in mend
    assert {report[other]["status"] for other in ("schema", "clock")} == {"ok"}


@pytest.mark.parametrize("off", [3600.0, -3600.0])
def test_a_clock_that_is_wrong_is_noticed(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + off)
    report = doctor("--only", "clock")
    way = "ahead of" if off > 0 else "behind"
    assert "NTP" in problem(report, "clock", f"3600.0 s {way} the database's")
    monkeypatch.setattr(time, "time", lambda: right() + off / 360)
    problem(doctor("--only", "clock"), "clock", f"10.0 s {way}", "warn")


def test_the_time_of_a_cached_answer_is_of_then_or_of_now(doctor: Doctor) -> None:
    with jwks_server.serve() as server:

        def seen(age: int, **headers: str) -> tuple[str, str]:
            date = formatdate(time.time() - age, usegmt=True)
            server.headers = {"Date": date, **headers}
            found = doctor("--only", "clock", JWKS_URL=server.url)["clock"]
            return found["status"], found["seen"]

        assert seen(0)[0] == seen(500, Age="500")[0] == seen(0, Age="500")[0] == "ok"
        assert seen(500)[0] == seen(500, Age="100")[0] == seen(-500, Age="500")[0] == "fail"
        assert "ahead of 127.0.0.1's" in seen(500)[1]


# What is elsewhere --------------------------------------------------------------------------------


def test_keys_that_cannot_be_had_are_named(doctor: Doctor) -> None:
    only = ("--only", "tokens")
    with jwks_server.serve() as server:
        key = jwks_server.ec_key()
        server.keys = [key, jwks_server.rsa_key(1024)]
        project = {"SUPABASE_URL": server.url}
        found = doctor(*only, **project)["tokens"]
        assert found["status"] == "ok"
        assert f"{key.id} (ES256); issuer {server.url}/auth/v1" in found["seen"]
        assert server.keys[1].id not in found["seen"]
        server.status = 404
        found = doctor(*only, JWKS_URL=f"{server.url}/keys?apikey={key.id}")["tokens"]
        assert f"{server.url}/keys answers HTTP 404" in found["seen"]
        assert "apikey" not in found["seen"]
        assert "PGSCRIBE_SUPABASE_URL" in problem(doctor(*only, **project), "tokens", "HTTP 404")
        server.status, server.body = 200, b"<html>"
        problem(doctor(*only, **project), "tokens", "gives no JWK set")
        server.body = b'{"keys": []}'
        assert doctor(*only, **project)["tokens"]["status"] == "ok", "the secret is enough"
    problem(doctor(*only, **project), "tokens", "nothing listens")
    problem(
        doctor(*only, JWT_SECRET="your-super-secret-jwt-token-with-at-least-32-characters-long"),
        "tokens", "everybody knows",
    )  # fmt: skip


def test_without_a_secret_there_must_be_a_key(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PGSCRIBE_JWT_SECRET", raising=False)

    async def tokens(**settings: str) -> Finding:
        return await services.check_tokens(
            Context(Settings.load(database_url=database, **settings))
        )

    with jwks_server.serve() as server:
        found = asyncio.run(tokens(supabase_url=server.url))
    assert (found.status, "no key that can be used" in found.seen) == ("fail", True)
    assert (
        asyncio.run(tokens()).seen == "no user's token can be checked: only API keys let anybody in"
    )


def test_a_bucket_that_is_missing_public_or_closed_to_us_is_named(doctor: Doctor) -> None:
    with serving(StandIn()) as server:

        def storage(**settings: str) -> Report:
            project = {
                "STORAGE": "supabase", "SUPABASE_URL": server.url,
                "SUPABASE_SECRET_KEY": server.secret_key, "MAX_UPLOAD_BYTES": "40000000",
            }  # fmt: skip
            report = doctor("--only", "storage", **(project | settings))
            assert server.secret_key not in json.dumps(report)
            return report

        assert "setup-storage" in problem(storage(), "storage", "There is no bucket audio")
        server.buckets["audio"] = Bucket(public=True, file_size_limit=40_000_000)
        problem(storage(), "storage", "the bucket is public: whoever knows a path hears")
        server.buckets["audio"] = Bucket(
            file_size_limit=40_000_000, allowed_mime_types=["audio/*", "video/*"]
        )
        problem(storage(), "storage", "Policies on storage.objects are missing")
        problem(storage(SUPABASE_SECRET_KEY="sb_secret_wrong"), "storage", "SECRET_KEY")
        problem(storage(SUPABASE_URL=f"{server.url}9"), "storage", "storage")


@contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system that has room for one block, as root may."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "pgscribe-test", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        (folder / "full").write_bytes(bytes(4096))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
def test_a_full_disk_is_named(doctor: Doctor, tmp_path: Path) -> None:
    with full_disk(tmp_path / "disk") as disk:
        report = doctor(
            "--only", "storage,scratch", STORAGE_DIR=str(disk), SCRATCH_DIR=str(disk / "scratch")
        )
    assert "Free its disk" in problem(report, "storage", f"{disk} cannot be written to (No space")
    assert "PGSCRIBE_SCRATCH_DIR" in problem(report, "scratch", "cannot be written to")


def test_folders_that_are_no_folders_and_disks_that_are_too_small_are_named(
    doctor: Doctor, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    report = doctor(
        "--only", "storage,scratch",
        STORAGE_DIR=str(tmp_path / "file" / os.fsdecode(b"\xff")),
        MAX_AUDIO_SECONDS="86400", WORKER_CONCURRENCY="1000000",
    )  # fmt: skip
    problem(report, "storage", "cannot be written to")
    problem(report, "scratch", "are advised", "warn")


def test_a_public_url_that_leads_nowhere_is_named(doctor: Doctor, port: int) -> None:
    report = doctor("--only", "storage", PUBLIC_URL=f"http://127.0.0.1:{port}")
    assert "PGSCRIBE_PUBLIC_URL" in problem(report, "storage", "does not answer", "warn")


# This machine -------------------------------------------------------------------------------------


def test_what_a_worker_lacks_is_named(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ("--only", "ffmpeg,weights,memory")
    report = doctor(*only, OPENAI_MODEL="small", MODELS_DIR=str(tmp_path), ENGINE_PROCESSES="999")
    assert "decodes recordings" in report["ffmpeg"]["seen"]
    assert "huggingface.co" in problem(report, "weights", "small: no weights in", "warn")
    assert "PGSCRIBE_ENGINE_PROCESSES" in problem(report, "memory", "999 processes with", "warn")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert "apt install ffmpeg" in problem(
        doctor("--only", "ffmpeg"), "ffmpeg", "This machine has no ffmpeg"
    )
    (tmp_path / "faster_whisper.py").write_text("raise ImportError('libcudnn is not there')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problem(doctor("--only", "engine"), "engine", "libcudnn is not there")
    modal = doctor("--only", "engine,ffmpeg", COMPUTE="modal")
    assert modal["engine"]["status"] == "skipped"


# Work ---------------------------------------------------------------------------------------------


def test_at_three_in_the_morning_it_says_why_nothing_goes_on(
    doctor: Doctor, database: str, conn: psycopg.Connection, user: UUID
) -> None:
    only = ("--only", "workers,queue,webhooks")
    problem(doctor(*only), "workers", "no worker is alive (none was ever heard of)", "warn")
    with Work(database) as work:
        work.execute(
            "insert into webhook_endpoints (user_id, url) values (%s, 'https://example.org')",
            (user,),
        )
        ended, *_ = work.insert_many(user, 3)
        work.start(ended)
        work.complete(ended)
        conn.execute("select pause_queue()")
        conn.execute("select pause_owner(%s)", (user,))
        report = doctor(*only)
        mend = problem(report, "workers", "while 2 jobs wait and 0 are in processing")
        assert "pgscribe worker" in mend
        mend = problem(report, "queue", "paused: transcription since 20", "warn")
        assert mend == "pgscribe resume --queue transcription"
        assert report["webhooks"]["seen"] == "1 endpoints, 1 deliveries wait"
        work.execute("update webhook_deliveries set due_at = now() + interval '1 hour'")
        assert doctor(*only)["webhooks"]["seen"] == (
            "1 endpoints, 0 deliveries wait; 1 did not arrive and are tried again later: "
            "`pgscribe webhooks deliveries --status queued`"
        )
        work.execute("update webhook_deliveries set due_at = null")
        conn.execute("select resume_queue()")
        conn.execute("insert into procrastinate.procrastinate_workers default values")
        age(conn)
    report = doctor(*only)
    assert report["workers"]["status"] == "ok"
    assert "max_running" in problem(report, "queue", "2 jobs wait, the oldest for 2 hours", "warn")
    problem(report, "webhooks", "1 deliveries wait to be sent, the oldest for 2 hours")
    with psycopg.connect(database, application_name="pgscribe tasks 0.0.9"):
        mend = problem(doctor(*only), "workers", "web servers of 0.0.9 run beside", "warn")
    assert "docs/upgrading.md" in mend
    conn.execute(
        "update procrastinate.procrastinate_workers set last_heartbeat = now() - interval '1 hour'"
    )
    problem(doctor(*only), "workers", "the last one 60 minutes ago")
    with conn.transaction():
        conn.execute("alter table processing_jobs disable trigger user")
        conn.execute(
            "insert into processing_jobs (user_id, file_path) values (%s, %s)",
            (user, f"{user}/a.mp3"),
        )
        conn.execute("alter table processing_jobs enable trigger user")
    mend = problem(doctor(*only), "queue", "1 jobs have no queue job and never start")
    assert "inserted again" in mend


def age(conn: psycopg.Connection) -> None:
    """Make all that waits two hours old, as only the tables' owner could."""
    for table, guard in (
        ("processing_jobs", "guard_processing_job"),
        ("webhook_deliveries", "guard_webhook_delivery"),
    ):
        conn.execute(
            f"alter table {table} disable trigger {guard};"
            f" update {table} set created_at = now() - interval '2 hours';"
            f" alter table {table} enable trigger {guard}".encode()
        )


def test_a_web_server_that_is_not_there_is_named(
    doctor: Doctor, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ("--only", "web")
    problem(doctor(*only, URL=f"http://127.0.0.1:{port}"), "web", "does not answer")
    found = doctor(*only, URL=f"http://somebody:hunter2@127.0.0.1:{port}")["web"]
    assert found["seen"].startswith("http://***@127.0.0.1:")
    with jwks_server.serve() as server:
        assert doctor(*only, URL=server.url)["web"]["status"] == "ok"
        server.status = 503
        assert "cannot reach what it needs" in problem(
            doctor(*only, URL=server.url), "web", "answers HTTP 503"
        )
        server.status = 404
        problem(doctor(*only, URL=server.url), "web", "answers HTTP 404")

        class Elsewhere(ServerAddress):
            url: str = server.url

        with monkeypatch.context() as patch:
            patch.setattr(queue, "ServerAddress", Elsewhere)
            assert "something else answers" in doctor(*only)["web"]["seen"]
        server.status = 200
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        assert doctor(*only, URL=server.url)["web"]["status"] == "ok"


def test_problems_are_told_together_the_worst_first() -> None:
    finding = together([warn("b", "do b."), fail("a", "do a.")], ok("all is well"))
    assert finding == Finding("fail", "a; b", "do a. do b.")
