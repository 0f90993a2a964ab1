"""`kill -9` at every step of a job, of workers and of the web server."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import UUID

import click
import psycopg
import pytest

from db.embedded import EmbeddedPostgres
from tests.faults.fleet import (
    SHORT_STALL_TIMEOUT,
    STALL_TIMEOUT,
    Database,
    Fleet,
    Jobs,
    Worker,
    until,
)
from tests.faults.invariants import assert_consistent, assert_each_attempt_ran_once

WHILE_WORKING = (
    "before registering",
    "after registering",
    "before the claim",
    "during the claim",
    "after the claim",
    "while a job runs",
    "after the audio is located",
    "after the plan is stored",
    "before the call is noted",
    "after the call is noted",
    "while a call runs",
    "during the chunk's storing",
    "after the chunk is stored",
    "after the usage is noted",
    "after the audio is forgotten",
    "before the end",
    "during the end",
    "after the end",
)
WHILE_STOPPING = (
    "before giving back",
    "during giving back",
    "after giving back",
    "before signing off",
    "during signing off",
    "after signing off",
)


@dataclass(frozen=True)
class Case:
    """A database of its own, with a worker that dies at one step and one that replaces it."""

    jobs: Jobs
    fleet: Fleet
    victim: Worker


@pytest.fixture(scope="module")
def cases(
    postgres: EmbeddedPostgres,
    database_names: Iterator[str],
    template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Case]]:
    """Provoke all of them at once: each then takes a stall time-out."""
    made: dict[str, Case] = {}
    with ExitStack() as stack:
        for step in (*WHILE_WORKING, *WHILE_STOPPING):
            name = next(database_names)
            postgres.create_database(name, template=template)
            stack.callback(postgres.drop_database, name)
            database = stack.enter_context(Database(postgres.url(database=name)))
            jobs = Jobs(database)
            user = jobs.make_user()
            if step in WHILE_STOPPING:
                jobs.insert(user, "long_once-600")
            jobs.insert(user, "sleep-0.05", 3)
            fleet = stack.enter_context(Fleet(jobs.database.url, tmp_path_factory.mktemp(name)))
            made[step] = Case(jobs, fleet, fleet.start(kill_at=step, shutdown_timeout=0.1))
        for step in WHILE_STOPPING:
            made[step].victim.says("start")
            made[step].victim.signal(signal.SIGTERM)
        for case in made.values():
            assert case.victim.ended() == -signal.SIGKILL
            case.fleet.start()
        yield made


@pytest.mark.parametrize("step", [*WHILE_WORKING, *WHILE_STOPPING])
def test_a_worker_killed_at_any_step_loses_nothing(cases: dict[str, Case], step: str) -> None:
    case = cases[step]
    case.jobs.wait_for_all()
    assert case.jobs.count("status <> 'completed'") == 0
    with psycopg.connect(case.jobs.database.url, autocommit=True) as conn:
        assert_consistent(conn)
    assert_each_attempt_ran_once(case.fleet.ledger())


def test_a_killed_workers_job_soon_runs_again(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    victim = fleet.start_ready()
    job_id = jobs.insert_one(user, "long_once-600")
    victim.says("start")
    fleet.start_ready()
    victim.kill()
    killed_at = time.monotonic()
    jobs.end(job_id)
    _, again = fleet.starts(job_id)
    recovery = again.at - killed_at
    click.echo(f"recovered {recovery:.2f} s after kill -9 (stall time-out {STALL_TIMEOUT:g} s)")
    assert recovery < STALL_TIMEOUT + 10
    settled()
    assert jobs.attempts(job_id) == [(1, "retried", "worker_lost")]


def test_a_poison_job_fails_after_its_attempts_and_the_others_complete(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    poison = jobs.insert_one(user, "poison")
    others = jobs.insert(user, "sleep-0.02", 20)

    def supervise() -> bool:
        """Keep two workers running, as any supervisor would."""
        for _ in range(2 - len(fleet.living)):
            fleet.start(stall_timeout=SHORT_STALL_TIMEOUT)
        return jobs.count("completed_at is null") == 0

    until(supervise, "all jobs have ended")
    settled()
    row = jobs.row(poison)
    assert (row["status"], row["error_code"], row["attempt"]) == ("failed", "worker_lost", 3)
    assert jobs.attempts(poison) == [
        (1, "retried", "worker_lost"),
        (2, "retried", "worker_lost"),
        (3, "failed", "worker_lost"),
    ]
    assert {jobs.row(other)["status"] for other in others} == {"completed"}
    assert len(fleet.starts(poison)) == 3


def test_a_poison_job_does_not_take_its_neighbours_down(
    fleet: Fleet, jobs: Jobs, user: UUID, settled: Callable[[], None]
) -> None:
    """They run in the same process, so its first attempts cost them one, too; not its last."""
    poison = jobs.insert_one(user, "poison-0.3")
    others = jobs.insert(user, "sleep-1", 3)

    def supervise() -> bool:
        if not fleet.living:
            fleet.start(concurrency=4, stall_timeout=SHORT_STALL_TIMEOUT)
        return jobs.count("completed_at is null") == 0

    until(supervise, "all jobs have ended")
    settled()
    assert jobs.row(poison)["status"] == "failed"
    assert {jobs.row(other)["status"] for other in others} == {"completed"}
