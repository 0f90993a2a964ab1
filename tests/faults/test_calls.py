"""Calls to Modal, over its real protocol, while workers are killed: each is paid for once."""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import psycopg
import pytest

from jobs.compute import packaged_weights
from modal_functions.engines import FASTER_WHISPER
from tests.faults.fleet import SHORT_STALL_TIMEOUT, Database, Fleet, Jobs, until
from tests.local_modal.server import Address, ServerProcess
from tests.local_modal.settings import Settings

REPO = Path(__file__).parents[2]
TRANSCRIBE = "SpeechModel.transcribe"
CHUNKS = 20
DONE = "select count(*) from processing_job_chunks where result is not null"
NOTE_ALL = """
    create table noted (call_id text primary key, job_id uuid, index integer);
    create function note() returns trigger language plpgsql security definer as $$ begin
      insert into public.noted values (new.call_id, new.job_id, new.index); return null; end $$;
    create trigger note after update on processing_job_chunks for each row
      when (new.call_id is distinct from old.call_id and new.call_id is not null)
      execute function note()"""


@pytest.fixture(scope="module")
def modal_server() -> Iterator[Address]:
    with ServerProcess.started(Settings(apps=("tests.faults.speech_app:app",))) as server:
        yield server


@pytest.fixture
def cloud(modal_server: Address, monkeypatch: pytest.MonkeyPatch, db: Database) -> Iterator[Any]:
    """What workers call; ``noted`` has all ids of calls that have ever been in the database."""
    yield from use(modal_server, monkeypatch, db)


@pytest.fixture
def whisper_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, db: Database) -> Iterator[Any]:
    """The same with the app that is deployed on Modal, its engine and a model."""
    models = Path(os.environ.get("PGSCRIBE_TEST_MODELS_DIR") or REPO / ".pgscribe" / "models")
    if packaged_weights.ensure(FASTER_WHISPER, "base", models) is None:
        pytest.skip("the packages with the weights of base are not installed")
    settings = Settings(
        apps=("modal_functions.app:app",),
        containers=1,
        container_environment={
            "PGSCRIBE_AUDIO_DIR": str(tmp_path / "audio"),
            "PGSCRIBE_WEIGHTS_DIR": str(models),
            "PGSCRIBE_MODAL_MIN_SPAN": "2",
            "PGSCRIBE_MODAL_MAX_SPAN": "5",
        },
    )
    monkeypatch.setenv("FAULT_AUDIO", str(REPO / "examples" / "sample.mp3"))
    with ServerProcess.started(settings) as server:
        yield from use(server, monkeypatch, db)


def use(server: Address, monkeypatch: pytest.MonkeyPatch, db: Database) -> Iterator[Any]:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PGSCRIBE_COMPUTE", "modal")
    # Its Modal runs on this machine, and its worker has a storage of its own.
    monkeypatch.setenv("PGSCRIBE_PUBLIC_URL", "http://127.0.0.1")
    monkeypatch.setenv("PGSCRIBE_JWT_SECRET", "a secret of thirty-two characters or more")
    with psycopg.connect(db.url) as conn:
        conn.execute(NOTE_ALL)
    yield server.control
    server.control.reset()


def completed_text(chunks: int = CHUNKS) -> str:
    return " ".join(f"chunk {n}" for n in range(chunks))


def test_a_job_runs_on_modal(fleet: Fleet, jobs: Jobs, user: UUID, cloud: Any) -> None:
    fleet.start()
    row = jobs.end(jobs.insert_one(user, f"chunks-{CHUNKS}"))
    assert (row["status"], row["result"]["text"]) == ("completed", completed_text())
    assert row["usage"]["calls"] == 1 + CHUNKS
    assert row["usage"]["gpu_seconds"] == pytest.approx(0.3 * CHUNKS)
    assert len(cloud.events("started", function=TRANSCRIBE)) == CHUNKS


@pytest.mark.parametrize(
    ("kills", "at_a_time", "seed"),
    [(4, 3, 1), *(pytest.param(15, 1, seed, marks=pytest.mark.slow) for seed in (2, 3))],
)
def test_whenever_a_worker_is_killed_each_chunk_is_transcribed_once(
    fleet: Fleet,
    jobs: Jobs,
    user: UUID,
    cloud: Any,
    db: Database,
    monkeypatch: pytest.MonkeyPatch,
    kills: int,
    at_a_time: int,
    seed: int,
) -> None:
    """Twice only where it was killed between Modal's answer and the commit of the call's id."""
    monkeypatch.setenv("PGSCRIBE_MAX_CHUNKS_PER_JOB", str(at_a_time))  # so that work is left
    chance = random.Random(seed)
    job_id = jobs.insert_one(user, f"chunks-{CHUNKS}", max_attempts=20)
    killed = 0
    for _ in range(kills):
        worker = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
        until(lambda w=worker: w.said("start") or ended(jobs, job_id), "the job is claimed")  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.7))
        if ended(jobs, job_id):
            break
        worker.kill()
        killed += 1
    fleet.start(stall_timeout=SHORT_STALL_TIMEOUT)
    row = jobs.end(job_id)
    assert (row["status"], row["result"]["text"]) == ("completed", completed_text())
    assert row["attempt"] == killed + 1
    assert killed >= 3

    noted = {r["call_id"]: r["index"] for r in db.rows("select * from noted")}
    assert Counter(noted.values()) == dict.fromkeys(range(CHUNKS), 1), "each chunk, one call"
    started = [event["call_id"] for event in cloud.events("started", function=TRANSCRIBE)]
    assert max(Counter(started).values()) == 1
    unknown = set(started) - set(noted)
    click.echo(f"{killed} kills; of {len(started)} calls {len(unknown)} are in the window")
    assert len(unknown) <= killed
    assert set(noted) <= set(started)


def test_a_recording_is_transcribed_as_if_no_worker_had_been_killed(
    fleet: Fleet,
    jobs: Jobs,
    user: UUID,
    whisper_cloud: Any,
    db: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real recording, a real model: the same text, and each chunk paid for once."""
    monkeypatch.setenv("PGSCRIBE_MAX_CHUNKS_PER_JOB", "2")  # so that work is left
    undisturbed = fleet.start_ready()
    expected = jobs.end(jobs.insert_one(user, "a"), patience=120)
    assert expected["status"] == "completed", expected["error"]
    undisturbed.kill()
    db.value("with gone as (delete from noted returning 1) select count(*) from gone")
    whisper_cloud.reset()

    chance = random.Random(4)
    job_id = jobs.insert_one(user, "b", max_attempts=20)
    for _ in range(3):
        worker = fleet.start_ready(stall_timeout=SHORT_STALL_TIMEOUT)
        worker.says("start")
        more = db.value(DONE) + 2
        until(lambda n=more: db.value(DONE) >= n, "it goes on where the last one was")  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.5))
        worker.kill()
    fleet.start(stall_timeout=SHORT_STALL_TIMEOUT)
    row = jobs.end(job_id, patience=120)
    assert (row["status"], row["attempt"]) == ("completed", 4)
    assert row["result"] == expected["result"]
    assert row["usage"]["calls"] == expected["usage"]["calls"] >= 12
    assert row["usage"]["gpu_seconds"] > 1
    started = Counter(e["call_id"] for e in whisper_cloud.events("started", function=TRANSCRIBE))
    noted = {r["call_id"] for r in db.rows("select * from noted")}
    assert set(started.values()) == {1}
    assert len(noted) == row["usage"]["calls"] - 1, "each chunk, one call"
    assert len(set(started) - noted) <= 3, "at most one for each kill, in the window"


def test_a_worker_killed_in_the_window_pays_for_that_chunk_twice(
    fleet: Fleet, jobs: Jobs, user: UUID, cloud: Any, db: Database
) -> None:
    """Modal has taken the call, and its id is not in the database yet: docs/decisions/0003."""
    job_id = jobs.insert_one(user, "chunks-4")
    fleet.start(kill_at="before the call is noted", stall_timeout=SHORT_STALL_TIMEOUT).ended()
    fleet.start(stall_timeout=SHORT_STALL_TIMEOUT)
    row = jobs.end(job_id)
    assert (row["status"], row["result"]["text"]) == ("completed", completed_text(4))
    noted = [r["index"] for r in db.rows("select * from noted order by index")]
    assert noted == [0, 1, 2, 3]
    spawned = cloud.events("spawned", function=TRANSCRIBE)
    assert 5 <= len(spawned) <= 8, "what was started before it was killed"


def ended(jobs: Jobs, job_id: UUID) -> bool:
    return jobs.row(job_id)["completed_at"] is not None


@pytest.mark.alone
def test_a_cancelled_job_reaches_every_call(
    fleet: Fleet, jobs: Jobs, user: UUID, cloud: Any, db: Database, settled: Callable[[], None]
) -> None:
    worker = fleet.start_ready()
    jobs.end(jobs.insert_one(user, "chunks-1"))  # its container is warm
    cloud.reset()
    job_id = jobs.insert_one(user, "chunks-60")
    worker.says("start", 2)
    calls = "select call_id from noted where job_id = %s"
    until(lambda: len(db.rows(calls, job_id)) >= 15, "many calls are noted")
    cancelled_at = time.monotonic()
    db.value("select cancel_processing_job(%s) is null", job_id)
    assert jobs.end(job_id)["status"] == "cancelled"
    assert time.monotonic() - cancelled_at < 2
    noted = {row["call_id"] for row in db.rows(calls, job_id)}
    assert len(noted) < 60, "it stopped before it was done"

    def over() -> set[str]:
        events = cloud.events("cancelled") + cloud.events("finished", function=TRANSCRIBE)
        return {event["call_id"] for event in events}

    until(lambda: noted <= over(), "each call was cancelled or has finished")
    assert cloud.events("cancelled")
    settled()


def test_calls_go_on_while_modal_is_out_of_reach(
    fleet: Fleet, jobs: Jobs, user: UUID, cloud: Any, db: Database
) -> None:
    worker = fleet.start_ready()
    job_id = jobs.insert_one(user, f"chunks-{CHUNKS}")
    worker.says("start")
    cloud.wait("started", 2, function=TRANSCRIBE)
    for fault in (cloud.cut, cloud.refuse):
        fault()
        time.sleep(0.5)
        cloud.heal()
    row = jobs.end(job_id)
    assert (row["status"], row["attempt"]) == ("completed", 1)
    assert row["result"]["text"] == completed_text()
    started = Counter(event["call_id"] for event in cloud.events("started", function=TRANSCRIBE))
    noted = {r["call_id"] for r in db.rows("select * from noted")}
    assert max(started.values()) == 1
    assert len(noted) == CHUNKS


def test_a_worker_starts_while_modal_is_out_of_reach(
    fleet: Fleet, jobs: Jobs, user: UUID, cloud: Any
) -> None:
    cloud.refuse()
    worker = fleet.start_ready()
    job_id = jobs.insert_one(user, "chunks-2")
    worker.says("start")
    cloud.heal()
    row = jobs.end(job_id)
    assert (row["status"], row["attempt"]) == ("completed", 1)
    assert "Modal does not answer" in worker.log


@pytest.mark.parametrize("fault", ["preempt", "lose", "INTERNAL_FAILURE", "INIT_FAILURE"])
def test_what_happens_to_a_call_at_modal_costs_no_attempt(
    fleet: Fleet, jobs: Jobs, user: UUID, cloud: Any, fault: str
) -> None:
    worker = fleet.start_ready()
    job_id = jobs.insert_one(user, "chunks-4")
    worker.says("start")
    call_id = cloud.wait("started", function=TRANSCRIBE)[0]["call_id"]
    if fault in {"preempt", "lose"}:
        getattr(cloud, fault)(call_id)
    else:
        cloud.end(call_id, fault)
    row = jobs.end(job_id)
    assert (row["status"], row["attempt"]) == ("completed", 1)
    assert row["usage"]["calls"] == 5 + (fault != "preempt")
