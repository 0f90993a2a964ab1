"""How the command line shows a job: a progress bar on a terminal, plain lines otherwise."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

import click

from jobs.models import JobStatus, JobSummary, Transcript

STEPS = 100
LONGEST = 120  # characters of an error in a list
LINE_EVERY = 20  # steps between two plain lines


class Progressing(Protocol):
    """A job, or an event that tells of one."""

    @property
    def status(self) -> JobStatus:
        """The job's status."""
        ...

    @property
    def progress(self) -> float:
        """How far it has come, 0 to 1."""
        ...


OnChange = Callable[[Progressing], None]


@contextmanager
def progress(label: str) -> Iterator[OnChange]:
    """Yield a callback that shows a job's progress on standard error."""
    if sys.stderr.isatty():
        with click.progressbar(length=STEPS, label=label, file=sys.stderr) as bar:
            yield lambda job: bar.update(_steps(job) - bar.pos)
        return
    shown: tuple[JobStatus, int] | None = None

    def show_line(job: Progressing) -> None:
        nonlocal shown
        now = (job.status, _steps(job) // LINE_EVERY)
        if now != shown:
            shown = now
            click.echo(f"{label}: {job.status} {_steps(job)} %", err=True)

    yield show_line


def _steps(job: Progressing) -> int:
    return int(job.progress * STEPS)


def timestamp(seconds: float) -> str:
    """Return ``seconds`` as ``m:ss.t``, or ``h:mm:ss.t`` from an hour on."""
    minutes, rest = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{clock}:{rest // 10:02}.{rest % 10}"


def lines(transcript: Transcript) -> Iterator[str]:
    """Yield a transcript's segments with their times."""
    for segment in transcript.segments:
        yield f"[{timestamp(segment.start)} - {timestamp(segment.end)}]  {segment.text.strip()}"


def age(at: datetime) -> str:
    """Return how long ago that was, to the second."""
    return str(datetime.now(UTC) - at).split(".", maxsplit=1)[0]


def summary(job: JobSummary) -> str:
    """Return a job as one line."""
    ago = age(job.created_at)
    line = f"{job.id}  {job.status:<10} {job.progress:4.0%}  {ago:>8} ago  {job.file_path}"
    return f"{line}  {job.error_code}: {shortened(job.error)}" if job.error else line


def shortened(text: str) -> str:
    """Return the beginning of a text that is too long for a line of a list."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
