"""Real Postgres for every test that asks for it: one migrated template, cloned per test."""

import fcntl
import functools
import os
import shutil
import signal
import tempfile
import time
import wave
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, cycle
from pathlib import Path
from typing import IO
from uuid import UUID, uuid4

import ffmpeg
import hypothesis
import imageio_ffmpeg
import psycopg
import pytest
from psycopg import sql

from db import migrate
from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs.database import connect
from jobs.queue import Queue
from jobs.settings import Settings
from tests import ports

REPO = Path(__file__).parent.parent
TEMPLATE = "pgscribe_template"
MEMORY = Path("/dev/shm")
ENOUGH_MEMORY = 4 * 1024**3  # bytes

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
# As many files of the repository as there are processes: whoever has locked one has a seat.
SEATS = sorted(Path(__file__).parent.glob("*.py"))[
    : int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
]
if PARALLEL:
    # Engines' threads that spin while they wait would take the cores from the other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The same examples each time, however slow the machine is: --hypothesis-profile=default has others.
hypothesis.settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take most of the machine, while there is nobody to wait for."""
    items.sort(key=_seats, reverse=True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let no more run beside a test than it bears: see the markers in pyproject.toml."""
    with _seated(_seats(item)):
        return (yield)


def _seats(item: pytest.Item) -> int:
    if item.get_closest_marker("alone"):
        return len(SEATS)
    return min(2, len(SEATS)) if item.get_closest_marker("heavy") else 1


@contextmanager
def _seated(seats: int) -> Iterator[None]:
    """Wait for as many seats. Whoever holds the gate goes next, so nobody starves."""
    if not PARALLEL:
        yield
        return
    with ExitStack() as files:
        gate = files.enter_context((REPO / "pyproject.toml").open())
        seats_there: list[IO[str]] = [files.enter_context(seat.open()) for seat in SEATS]
        taken: list[IO[str]] = []
        fcntl.flock(gate, fcntl.LOCK_EX)
        for seat in cycle(seats_there):
            if seat not in taken and _take(seat):
                taken.append(seat)
            if len(taken) == seats:
                break
            time.sleep(0.01)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            for seat in taken:
                fcntl.flock(seat, fcntl.LOCK_UN)  # forked children may have it open, too


def _take(seat: IO[str]) -> bool:
    try:
        fcntl.flock(seat, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> None:
    """Let SIGINT reach what the tests start, also where a background shell had it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def models_dir() -> Path:
    return REPO / ".pgscribe" / "models"


@pytest.fixture(scope="session")
def sample() -> Path:
    return REPO / "examples" / "sample.mp3"


@pytest.fixture(scope="session")
def silence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds in which nobody speaks."""
    path = tmp_path_factory.mktemp("audio") / "silence.wav"
    with wave.open(str(path), "wb") as recording:
        recording.setparams((1, 2, 16000, 0, "NONE", ""))
        recording.writeframes(bytes(2 * 16000 * 3))
    return path


@pytest.fixture(scope="session")
def clip(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 6 s of the sample."""
    path = tmp_path_factory.mktemp("audio") / "clip.wav"
    recording = ffmpeg.input(str(sample), t=6).output(str(path), ac=1, ar=16000)
    recording.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    return path


@contextmanager
def migrated_postgres(elsewhere: Path, **settings: str) -> Iterator[EmbeddedPostgres]:
    """Run a server with a migrated template: in memory, if there is enough, or ``elsewhere``.

    Cloning the template takes a thousand files, which is ten times as fast there as on some disks.
    """
    settings = {"max_wal_size": "256MB"} | settings
    # Tests stop it and start it again, and know it by its URL.
    with _folder_in_memory() as memory, ports.reserved() as port:
        server = EmbeddedPostgres(memory or elsewhere, port=port, settings=settings)
        with server:
            server.create_database(TEMPLATE)
            server.bootstrap(TEMPLATE)
            migrate.migrate(server.url(database=TEMPLATE))
            yield server
        server.remove()


@contextmanager
def _folder_in_memory() -> Iterator[Path | None]:
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < ENOUGH_MEMORY:
        yield None
        return
    for left in MEMORY.glob("pgscribe-tests-*"):  # by a run that was killed
        if not Path(f"/proc/{left.name.split('-')[2]}").exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"pgscribe-tests-{os.getpid()}-", dir=MEMORY))
    folder.chmod(0o711)  # root's server runs as `nobody`
    try:
        yield folder / "postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    with migrated_postgres(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(scope="session")
def template() -> str:
    """Name of the migrated database to clone."""
    return TEMPLATE


@pytest.fixture(scope="session")
def database_names() -> Iterator[str]:
    return (f"test_{number}" for number in count())


@pytest.fixture
def database(postgres: EmbeddedPostgres, database_names: Iterator[str]) -> Iterator[str]:
    """URL of a migrated database of the test's own, as `postgres`, which is no superuser."""
    name = next(database_names)
    postgres.create_database(name, template=TEMPLATE)
    yield postgres.url(database=name)
    postgres.drop_database(name)


@pytest.fixture
def conn(database: str) -> Iterator[psycopg.Connection]:
    """A connection as `postgres`; each statement is a transaction of its own."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@contextmanager
def cut_off(server: EmbeddedPostgres, database: str, spared: psycopg.Connection) -> Iterator[None]:
    """End all connections to a database but one, and let nobody connect meanwhile."""
    name = sql.Identifier(str(psycopg.conninfo.conninfo_to_dict(database)["dbname"]))
    allow, forbid = (
        sql.SQL("alter database {} allow_connections " + may).format(name)
        for may in ("true", "false")
    )
    with psycopg.connect(server.url(user=SUPERUSER), autocommit=True) as admin:
        admin.execute(forbid)
        try:
            admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = %s and pid <> %s",
                (name.as_string().strip('"'), spared.info.backend_pid),
            )
            yield
        finally:
            admin.execute(allow)


MakeUser = Callable[[], UUID]


@pytest.fixture
def make_user(conn: psycopg.Connection) -> MakeUser:
    def make() -> UUID:
        user_id = uuid4()
        conn.execute(
            "insert into auth.users (id, email) values (%s, %s)",
            (user_id, f"{user_id}@example.org"),
        )
        return user_id

    return make


@pytest.fixture
def user(make_user: MakeUser) -> UUID:
    return make_user()


@pytest.fixture
def settings(database: str, tmp_path: Path, models_dir: Path) -> Settings:
    return Settings.load(
        database_url=database,
        jwt_secret="a secret of thirty-two characters or more",
        storage_dir=tmp_path / "storage",
        models_dir=models_dir,
        scratch_dir=tmp_path / "scratch",
    )


@pytest.fixture
async def queue(settings: Settings) -> AsyncIterator[Queue]:
    connected = functools.partial(connect, settings, name="test")
    queue = Queue(connected, max_attempts=3, stall_timeout=30)
    yield queue
    await queue.close()
