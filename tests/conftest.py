"""Real Postgres for every test that asks for it: one migrated template, cloned per test."""

import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest

from db import migrate
from db.embedded import EmbeddedPostgres
from jobs.settings import Settings

REPO = Path(__file__).parent.parent
TEMPLATE = "pgscribe_template"


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
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    server = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"))
    with server:
        server.create_database(TEMPLATE)
        server.bootstrap(TEMPLATE)
        migrate.migrate(server.url(database=TEMPLATE))
        yield server
    server.remove()


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
