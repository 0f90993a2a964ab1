"""Everything on this machine: embedded Postgres, web server and worker, one start and stop."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, MappingProxyType, TracebackType
from typing import IO, Self
from uuid import UUID

import httpx2
import psycopg

from db import migrate
from db.embedded import EmbeddedPostgres, EmbeddedPostgresError
from jobs import operate
from jobs.errors import PgscribeError
from jobs.settings import Settings
from jobs.sql import DEV
from jobs.tokens import issue_token

USER_ID = UUID("00000000-0000-4000-8000-000000000001")
USER_EMAIL = "dev@pgscribe.local"
LOOPBACK = "127.0.0.0/8,::1/128"
NETWORKS = "PGSCRIBE_WEBHOOK_NETWORKS"
TOKEN_LIFETIME = 7 * 24 * 3600  # seconds
START_TIMEOUT = 60  # seconds
STOP_TIMEOUT = 20  # seconds, then a process is killed


class StartFailed(PgscribeError):
    """A part of the embedded environment did not start; the message says where its log is."""

    code = "start_failed"


def listen(wanted: int) -> socket.socket:
    """Return a socket that listens on loopback, on another port if ``wanted`` is taken."""
    for port in (wanted, 0):
        with contextlib.suppress(OSError):
            return socket.create_server(("127.0.0.1", port))
    raise StartFailed("No free port on loopback")


class Embedded:
    """The embedded environment under ``home``. Use as a context manager.

    What it starts ends with it, also when this process is killed: each child watches a pipe.
    ``quiet`` sends the children's logs to files under ``home`` instead of the terminal.
    """

    def __init__(self, home: Path, *, port: int = 0, quiet: bool = False) -> None:
        self._home = home
        self._file = home / "dev.env"
        self._quiet = quiet
        self._stack = ExitStack()
        # Listens from here on: a port that is only looked up is somebody else's by the time that
        # the web server is up.
        self._listener = listen(port)
        self._port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.postgres = EmbeddedPostgres(home / "postgres")
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def settings(self) -> Settings:
        """The settings that the web server and the worker run with."""
        return Settings.load(
            database_url=self.postgres.url(),
            jwt_secret=self._secret("jwt-secret", secrets.token_hex(32)),
            storage_dir=self._home / "storage",
            models_dir=self._home / "models",
            scratch_dir=self._home / "scratch",
        )

    @property
    def token(self) -> str:
        """A token of the development user."""
        return issue_token(self.settings, USER_ID, lifetime=TOKEN_LIFETIME, email=USER_EMAIL)

    @property
    def sign_in_password(self) -> str | None:
        """The password of the web app; none where users sign in with a Supabase project instead."""
        settings = self.settings
        if settings.supabase_url or settings.supabase_publishable_key:
            return None
        return self._secret("sign-in-password", secrets.token_urlsafe(18))

    @property
    def _worker_environment(self) -> dict[str, str]:
        """What workers are told about webhooks where the user has not said otherwise."""
        settings = self.settings
        told = {}
        if "webhook_networks" not in settings.model_fields_set:
            told[NETWORKS] = LOOPBACK
        # Modal can't reach this machine: it has to be told so, not to try.
        if settings.public_url is None and settings.compute == "local":
            told["PGSCRIBE_PUBLIC_URL"] = self.url
        return told

    def _secret(self, name: str, new: str) -> str:
        """Return the secret that is kept under a name: a new one the first time."""
        path = self._home / name
        with contextlib.suppress(FileNotFoundError):
            return path.read_text(encoding="ascii")
        _write_secret(path, new)
        return path.read_text(encoding="ascii")

    def __enter__(self) -> Self:
        with self._listener, ExitStack() as stack:
            self._home.mkdir(parents=True, exist_ok=True)
            self._start_postgres(stack)
            self._file.unlink(missing_ok=True)  # of one that was killed
            self._migrate()
            with psycopg.connect(self.postgres.url()) as conn:
                conn.execute(DEV["create_user"], {"id": USER_ID, "email": USER_EMAIL})
                operate.add(conn, str(USER_ID))
            self._start_web(stack)
            stack.enter_context(self._child("worker", environment=self._worker_environment))
            self._wait_for_web()
            stack.enter_context(self._environment_file())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _undisturbed():
            self._stack.close()

    def _start_postgres(self, stack: ExitStack) -> None:
        try:
            stack.enter_context(self.postgres)
        except EmbeddedPostgresError as exc:
            raise StartFailed(str(exc)) from exc

    def _migrate(self) -> None:
        try:
            migrate.migrate(self.postgres.url())
        except (migrate.MigrationBlocked, migrate.MigrationFailed) as exc:
            raise StartFailed(str(exc)) from exc

    def _start_web(self, stack: ExitStack) -> None:
        environment = {"PGSCRIBE_LOCAL_SIGN_IN_PASSWORD": self.sign_in_password}
        number = self._listener.fileno()
        arguments = "--port", str(self._port), "--listener", str(number)
        stack.enter_context(
            self._child("web", *arguments, environment=environment, passed=(number,))
        )
        self._listener.close()  # else nobody would refuse connections once the child has ended

    def _environment(self) -> dict[str, str]:
        settings = self.settings
        return {
            "PGSCRIBE_DATABASE_URL": settings.database_url.get_secret_value(),
            "PGSCRIBE_JWT_SECRET": settings.require_jwt_secret(),
            "PGSCRIBE_STORAGE_DIR": str(settings.storage_dir.resolve()),
            "PGSCRIBE_MODELS_DIR": str(settings.models_dir.resolve()),
            "PGSCRIBE_SCRATCH_DIR": str(settings.scratch_dir.resolve()),
        }

    @contextlib.contextmanager
    def _environment_file(self) -> Iterator[None]:
        """Let other ``pgscribe`` commands in this folder find the running environment."""
        values = self._environment() | {"PGSCRIBE_URL": self.url, "PGSCRIBE_TOKEN": self.token}
        # Else another worker here would refuse what this one's delivers.
        if networks := self._worker_environment.get(NETWORKS):
            values |= {NETWORKS: networks}
        _write_secret(self._file, "".join(f"{name}='{value}'\n" for name, value in values.items()))
        try:
            yield
        finally:
            self._file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _child(
        self,
        name: str,
        *arguments: str,
        environment: Mapping[str, str | None] = MappingProxyType({}),
        passed: Sequence[int] = (),
    ) -> Iterator[None]:
        own = {key: value for key, value in environment.items() if value is not None}
        with ExitStack() as stack:
            output: IO[bytes] | None = None
            if self._quiet:
                output = stack.enter_context((self._home / f"{name}.log").open("wb"))
            child = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", name, "--stop-with-stdin", *arguments],
                env=os.environ | self._environment() | own,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=passed,
                start_new_session=True,  # Ctrl-C is for this process, which stops them in order
            )
            self.children[name] = child
            try:
                yield
            finally:
                _stop(child)

    def _wait_for_web(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/healthz").is_success:
                    return
            time.sleep(0.05)
        raise StartFailed(f"The web server did not answer within {START_TIMEOUT} s")

    def check(self) -> None:
        """Raise ``StartFailed`` if a child has ended."""
        for name, child in self.children.items():
            if child.poll() is not None:
                log = f"see {self._home / name}.log" if self._quiet else "its log is above"
                raise StartFailed(f"{name} ended with status {child.returncode}; {log}")


def _write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read, as a whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    new.replace(path)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let a second Ctrl-C not break off the clean-up."""
    numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_on_signals() -> None:
    """Turn SIGTERM and SIGHUP into ``SystemExit``, so that context managers clean up."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGHUP, leave)
