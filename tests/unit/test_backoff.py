"""Pauses between tries, and between attempts."""

from datetime import UTC, datetime
from typing import Any

import pytest

from jobs.backoff import Backoff
from jobs.errors import DatabaseUnavailable, InvalidInput, TranscriptionFailed
from jobs.execution import Job
from jobs.tasks import LONGEST_PAUSE, AttemptPolicy


def test_pauses_double_up_to_a_limit_and_start_again() -> None:
    backoff = Backoff(first=1.0, longest=8.0)
    pauses = [backoff.next() for _ in range(50)]
    for pause, whole in zip(pauses, [1, 2, 4, *[8] * 47], strict=True):
        assert whole / 2 <= pause <= whole
    backoff.reset()
    assert backoff.next() <= 1


def test_pauses_of_many_processes_differ() -> None:
    assert len({Backoff().next() for _ in range(20)}) > 10


def job(attempts: int) -> Job:
    fields: dict[str, Any] = dict.fromkeys(["lock", "queueing_lock"])
    return Job(id=1, queue="transcription", task_name="transcribe", attempts=attempts, **fields)


def pause_after(exc: Exception, attempts: int = 0) -> float | None:
    decision = AttemptPolicy().get_retry_decision(exception=exc, job=job(attempts))
    if decision is None:
        return None
    assert decision.retry_at is not None
    return (decision.retry_at - datetime.now(UTC)).total_seconds()


@pytest.mark.parametrize(("attempts", "shortest", "longest"), [(0, 1, 2), (3, 8, 16)])
def test_attempts_are_further_and_further_apart(
    attempts: int, shortest: float, longest: float
) -> None:
    pause = pause_after(DatabaseUnavailable(), attempts)
    assert pause is not None
    assert shortest - 0.5 <= pause <= longest


def test_a_pause_has_a_limit() -> None:
    pause = pause_after(DatabaseUnavailable(), 19)
    assert pause is not None
    assert pause <= LONGEST_PAUSE


def test_what_was_asked_for_is_kept() -> None:
    busy = TranscriptionFailed("busy", "Too many requests", retryable=True, retry_after=90.0)
    pause = pause_after(busy)
    assert pause is not None
    assert pause == pytest.approx(90, abs=1)


@pytest.mark.parametrize(
    "exc", [InvalidInput("no"), ValueError(), TranscriptionFailed("x", "x", retryable=False)]
)
def test_final_errors_are_not_tried_again(exc: Exception) -> None:
    assert pause_after(exc) is None
