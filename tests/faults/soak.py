"""Random faults under load, for a given time; then everything is healed: nothing may be lost.

Run it as ``python tests/faults/soak.py --seconds 600``. Its last line is "soak: ok", or it says
what was violated and exits with 1. The line before has its counts as JSON. The same seed chooses
the same faults, not their moments.
"""

import contextlib
import heapq
import itertools
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import psycopg

sys.path.insert(0, str(Path(__file__).parents[2]))

from db import migrate
from db.embedded import EmbeddedPostgres
from tests.faults.fleet import (
    Database,
    Fleet,
    Jobs,
    Worker,
    assert_no_defects,
    restart_postgres,
    signal_all,
)
from tests.faults.invariants import ALWAYS, assert_consistent, assert_each_attempt_ran_once
from tests.faults.proxy import Proxy

WORKERS = 4
CONCURRENCY = 4
USERS = 6
SECONDS_TO_END = 600.0  # jobs that kill their workers end one after the other
NEVER_END = ("sleep-600", "stubborn-0.5")  # until they are cancelled
SCRIPTS = (
    *("sleep", "sleep-0.02", "sleep-0.1", "sleep-0.5", "sleep-2") * 6,
    *("retryable-1", "retryable-2", "fail", "nul", "surrogate", "nan", *NEVER_END),
)
POISON = "poison-0.2"
KILL_AT = (
    *("before registering", "after the claim", "while a job runs", "before the end"),
    *("during the end", "after the end", "during giving back", "before signing off"),
)
INJECTED = {
    *("worker_lost", "database_unavailable", "engine_crashed"),
    *("internal_error", "result_not_storable"),
}
DISCONNECT = (
    "select count(pg_terminate_backend(pid)) from pg_stat_activity"
    " where datname = current_database() and application_name like %s and random() < %s"
)
RANDOM_JOB = (
    "select count(*) from processing_jobs p cross join lateral {}_processing_job(p.id)"
    " where p.id in (select id from processing_jobs tablesample bernoulli (20) limit 5)"
)


class Load:
    """Inserts, cancels, retries and deletes in a thread, whether or not the database is there."""

    def __init__(self, jobs: Jobs, chance: random.Random, *, poison: bool) -> None:
        self._jobs = jobs
        self._chance = chance
        self._scripts = (*SCRIPTS, POISON) if poison else SCRIPTS
        self._users = [jobs.make_user() for _ in range(USERS)]
        self._accepted: dict[UUID, UUID] = {}  # the job's owner
        self._over = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self.counts: Counter[str] = Counter()

    @property
    def accepted(self) -> set[UUID]:
        """Jobs whose insert was answered, and whose owner is still there."""
        return {job for job, owner in self._accepted.items() if owner in self._users}

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._over.wait(self._chance.uniform(0, 0.08)):
                (act,) = self._chance.choices(
                    (self._insert, self._cancel, self._retry, self._delete), (100, 6, 6, 1)
                )
                with contextlib.suppress(psycopg.OperationalError):
                    act()
                    self.counts[act.__name__.strip("_")] += 1
        except Exception as exc:  # noqa: BLE001 - raised where somebody sees it
            self._failure = exc

    def _insert(self) -> None:
        user = self._chance.choice(self._users)
        count = self._chance.choice((1, 1, 1, 2, 5))
        delay = self._chance.choice((0.0, 0.0, 0.0, 0.5, 3.0))
        priority = self._chance.randint(-1, 1)
        script = self._chance.choice(self._scripts)
        inserted = self._jobs.insert(user, script, count, delay=delay, priority=priority)
        self._accepted |= dict.fromkeys(inserted, user)

    def _cancel(self) -> None:
        self._jobs.database.value(RANDOM_JOB.format("cancel"))

    def _retry(self) -> None:
        self._jobs.database.value(RANDOM_JOB.format("retry"))

    def _delete(self) -> None:
        """Delete a user; a new one takes the place, whether or not that was answered."""
        place = self._chance.randrange(len(self._users))
        user, self._users[place] = self._users[place], self._jobs.make_user()
        self._jobs.database.insist("delete from auth.users where id = %s", user)


class Chaos:
    """Provokes faults, one after the other; what lasts is healed some seconds later."""

    def __init__(
        self,
        server: EmbeddedPostgres,
        database: Database,
        fleet: Fleet,
        proxy: Proxy,
        chance: random.Random,
    ) -> None:
        self._server = server
        self._database = database
        self._fleet = fleet
        self._proxy = proxy
        self._chance = chance
        self._order = itertools.count()
        self._cures: list[tuple[float, int, Callable[[], None]]] = []
        self._faults: tuple[tuple[Callable[[], None], int], ...] = (
            (self._kill_worker, 6),
            (self._terminate_worker, 3),
            (self._stop_worker, 4),
            (self._doom_worker, 4),
            (self._restart_postgres, 2),
            (self._disconnect, 6),
            (self._lock_rows, 3),
            (self._sweep, 3),
            (self._cut, 3),
            (self._swallow, 2),
            (self._hold, 2),
            (self._refuse, 2),
            (self._delay, 2),
        )
        self.counts: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._supervise()
            faults, weights = zip(*self._faults, strict=True)
            (fault,) = self._chance.choices(faults, weights)
            self.counts[fault.__name__.strip("_")] += 1
            with contextlib.suppress(psycopg.OperationalError):
                fault()
            self._cure_until(time.monotonic() + self._chance.uniform(0, 1.5))

    def heal(self) -> None:
        while self._cures:
            heapq.heappop(self._cures)[2]()
        self._proxy.delay = 0.0
        self._proxy.heal()
        for worker in self._fleet.living:
            worker.signal(signal.SIGCONT)

    def supervise_until(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + SECONDS_TO_END
        while time.monotonic() < deadline:
            self._supervise()
            if condition():
                return True
            time.sleep(0.2)
        return False

    def start_worker(self, kill_at: str = "") -> Worker:
        through_proxy = self._chance.random() < 0.5
        return self._fleet.start(
            url=self._proxy.url(self._fleet.url) if through_proxy else None,
            concurrency=self._chance.randint(1, CONCURRENCY),
            clock_offset=self._chance.choice((0.0, 0.0, 3600.0, -3600.0)),
            shutdown_timeout=self._chance.choice((0.1, 2.0)),
            max_attempts=20,
            kill_at=kill_at,
        )

    def _supervise(self) -> None:
        for _ in range(WORKERS - len(self._fleet.living)):
            self.start_worker()

    def _later(self, seconds: float, cure: Callable[[], None]) -> None:
        heapq.heappush(self._cures, (time.monotonic() + seconds, next(self._order), cure))

    def _cure_until(self, end: float) -> None:
        while True:
            now = time.monotonic()
            if self._cures and self._cures[0][0] <= now:
                heapq.heappop(self._cures)[2]()
            elif now >= end:
                return
            else:
                time.sleep(0.02)

    def _any_worker(self) -> Worker:
        return self._chance.choice(self._fleet.living)

    def _kill_worker(self) -> None:
        self._any_worker().kill()

    def _terminate_worker(self) -> None:
        worker = self._any_worker()
        for _ in range(self._chance.choice((1, 1, 2))):
            worker.signal(signal.SIGTERM)

    def _stop_worker(self) -> None:
        worker = self._any_worker()
        worker.signal(signal.SIGSTOP)
        pids = [worker.process.pid]
        self._later(self._chance.uniform(0, 9), lambda: signal_all(pids, signal.SIGCONT))

    def _doom_worker(self) -> None:
        self._any_worker().kill()
        self.start_worker(self._chance.choice(KILL_AT))

    def _restart_postgres(self) -> None:
        how = self._chance.choice((signal.SIGINT, signal.SIGQUIT, signal.SIGKILL))
        restart_postgres(self._server, how, pause=self._chance.choice((0.0, 0.0, 1.0, 4.0)))

    def _disconnect(self) -> None:
        name = self._chance.choice(("pgscribe worker", "pgscribe tasks %", "pgscribe %"))
        self._database.value(DISCONNECT, name, self._chance.choice((0.5, 1.0)))

    def _lock_rows(self) -> None:
        operator = psycopg.connect(self._database.url, options="-c lock_timeout=1s")
        self._later(self._chance.uniform(0, 5), operator.close)
        operator.execute(
            "select from processing_jobs where completed_at is null order by random() limit 5"
            " for update"
        )

    def _sweep(self) -> None:
        sweepers = [
            threading.Thread(
                target=self._database.try_value, args=("select pgscribe.sweep_stalled_jobs(5, 20)",)
            )
            for _ in range(4)
        ]
        for sweeper in sweepers:
            sweeper.start()
        for sweeper in sweepers:
            sweeper.join()

    def _cut(self) -> None:
        self._proxy.cut()

    def _swallow(self) -> None:
        self._proxy.swallow()
        self._later(self._chance.uniform(0, 12), self._proxy.heal)

    def _hold(self) -> None:
        self._proxy.hold()
        self._later(self._chance.uniform(0, 12), self._proxy.heal)

    def _refuse(self) -> None:
        self._proxy.refuse()
        self._later(self._chance.uniform(0, 12), self._proxy.heal)

    def _delay(self) -> None:
        self._proxy.delay = self._chance.choice((0.0, 0.001, 0.02))


def cancel_what_never_ends(jobs: Jobs) -> None:
    jobs.database.insist(
        "select count(*) from processing_jobs p cross join lateral cancel_processing_job(p.id)"
        " where p.completed_at is null and split_part(p.file_path, '/', 2) = any (%s)",
        list(NEVER_END),
    )


def check(database: Database, fleet: Fleet, load: Load) -> dict[str, int]:
    """Raise ``AssertionError`` for what is violated now that every job has ended; else count."""
    with psycopg.connect(database.url, autocommit=True) as conn:
        assert_consistent(conn)
        twice = len(conn.execute(ALWAYS["completed twice"].encode()).fetchall())
    ledger = fleet.ledger()
    assert_each_attempt_ran_once(ledger)
    rows = database.rows("select id, error_code, file_path from processing_jobs")
    lost = load.accepted - {row["id"] for row in rows}
    assert not lost, f"{len(lost)} jobs are gone"
    codes = {row["error_code"] for row in rows if row["error_code"]}
    assert codes <= INJECTED, f"jobs failed of their own accord: {codes - INJECTED}"
    assert_no_defects(fleet)
    attempts = sum(entry.event == "start" for entry in ledger)
    counts = {"accepted": len(load.accepted), "lost": len(lost)}
    return counts | {"completed_twice": twice, "attempts": attempts}


def summary(database: Database) -> dict[str, int]:
    rows = database.rows("select status, count(*) from processing_jobs group by 1 order by 1")
    return {row["status"]: row["count"] for row in rows}


def soak(folder: Path, seconds: float, seed: int, *, poison: bool) -> None:
    """Raise ``AssertionError`` if an invariant is violated."""
    chance = random.Random(seed)
    with ExitStack() as stack:
        server = EmbeddedPostgres(folder / "postgres")
        stack.callback(server.remove)
        server.start()
        migrate.migrate(server.url())
        database = stack.enter_context(Database(server.url()))
        proxy = stack.enter_context(Proxy(server.port))
        fleet = stack.enter_context(Fleet(database.url, folder))
        load = Load(Jobs(database), random.Random(seed), poison=poison)
        chaos = Chaos(server, database, fleet, proxy, chance)
        with load.running():
            chaos.run(seconds)
            chaos.heal()  # the load may wait for a lock that lasts until then
        click.echo(f"faults: {dict(chaos.counts)}")
        click.echo(f"load: {dict(load.counts)}")
        began = time.monotonic()

        def ended() -> bool:
            cancel_what_never_ends(Jobs(database))
            return not unfinished(database)

        in_time = chaos.supervise_until(ended)
        healed = round(time.monotonic() - began, 1)
        jobs = summary(database)
        click.echo(f"jobs: {jobs}; all ended {healed} s later")
        assert in_time, f"not ended: {unfinished(database)[:5]}"
        counts = check(database, fleet, load)
        faults = {"faults": chaos.counts, "load": load.counts}
        click.echo(json.dumps(faults | {"jobs": jobs, "healed_seconds": healed} | counts))


def unfinished(database: Database) -> list[dict[str, Any]]:
    return database.rows(
        "select q.id, q.status::text, q.worker_id, q.scheduled_at, p.id as job, p.status as said,"
        "       p.due_at, p.attempt, p.file_path"
        "  from procrastinate.procrastinate_jobs q"
        "  full join processing_jobs p on p.job_id = q.id::text"
        " where (q.status in ('todo', 'doing') and q.queue_name = 'transcription')"
        "    or p.status in ('queued', 'processing')"
    )


@click.command()
@click.option("--seconds", default=60.0, show_default=True, help="How long to provoke faults.")
@click.option("--seed", type=int, help="Choose the faults of an earlier run.")
@click.option("--poison", is_flag=True, help="Also with jobs that kill their worker.")
@click.option("--keep", is_flag=True, help="Keep the workers' logs if something was violated.")
def main(*, seconds: float, seed: int | None, poison: bool, keep: bool) -> None:
    """Kill, stop, cut off and restart everything at random; see that no job is lost."""
    logging.basicConfig(level=logging.ERROR)
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    click.echo(f"seed: {seed}")
    folder = Path(tempfile.mkdtemp(prefix="pgscribe-soak-"))
    try:
        soak(folder, seconds, seed, poison=poison)
    except AssertionError as error:
        click.echo(f"soak: violated: {error}")
        if keep:
            click.echo(f"logs: {folder}")
        sys.exit(1)
    finally:
        if not keep:
            shutil.rmtree(folder)
    click.echo("soak: ok")


if __name__ == "__main__":
    main()
