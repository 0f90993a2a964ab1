"""A Postgres of the fault suite's own, which its tests kill; workers as real processes."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from db.embedded import EmbeddedPostgres

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.conftest import migrated_postgres
from tests.faults.fleet import Database, Fleet, Jobs, assert_no_defects, until
from tests.faults.invariants import assert_consistent, assert_each_attempt_ran_once
from tests.faults.proxy import Proxy

HELD = (
    "select id from procrastinate.procrastinate_jobs"
    " where status = 'doing' and queue_name = 'transcription'"
)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    # Many databases with workers at once: each worker has a pool and a connection of its own.
    folder = tmp_path_factory.mktemp("postgres")
    with migrated_postgres(folder, max_connections="300") as server:
        yield server


@pytest.fixture(autouse=True)
def running_postgres(postgres: EmbeddedPostgres) -> Iterator[None]:
    """Start it again after a test that left it stopped."""
    if postgres.postmaster_pid is None:
        postgres.start()
    yield
    if postgres.postmaster_pid is None:
        postgres.start()


@pytest.fixture
def database(
    postgres: EmbeddedPostgres, database_names: Iterator[str], template: str
) -> Iterator[str]:
    name = next(database_names)
    postgres.create_database(name, template=template)
    yield postgres.url(database=name)
    if postgres.postmaster_pid is None:
        postgres.start()
    postgres.drop_database(name)


@pytest.fixture
def db(database: str) -> Iterator[Database]:
    with Database(database) as connections:
        yield connections


@pytest.fixture
def jobs(db: Database) -> Jobs:
    return Jobs(db)


@pytest.fixture
def make_user(jobs: Jobs) -> Callable[[], UUID]:
    return jobs.make_user


@pytest.fixture
def fleet(database: str, tmp_path: Path) -> Iterator[Fleet]:
    with Fleet(database, tmp_path) as workers:
        yield workers


@pytest.fixture
def proxy(postgres: EmbeddedPostgres) -> Iterator[Proxy]:
    with Proxy(postgres.port) as between:
        yield between


@pytest.fixture
def settled(db: Database, jobs: Jobs, fleet: Fleet) -> Callable[[], None]:
    """Wait until all jobs have ended, and check what must hold then."""

    def settle() -> None:
        jobs.wait_for_all()
        until(lambda: not db.rows(HELD), "no queue job is held any more")
        with psycopg.connect(db.url, autocommit=True) as conn:
            assert_consistent(conn)
        assert_each_attempt_ran_once(fleet.ledger())
        assert_no_defects(fleet)

    return settle
