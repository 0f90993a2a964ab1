"""How soon an idle worker starts a job after its commit: ``python -m benchmarks.pickup``.

Inserts one row at a time with plain SQL, as another service would, into an embedded environment of
its own, and waits until the job has ended (its audio is missing, so it ends at once). The last line
is one JSON object; times are in milliseconds. The start is the claim's time in the database, taken
against the moment just before the commit, so the commit itself is included.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import click
import psycopg

from examples.demo import insert_with_sql
from jobs.dev import USER_ID, Embedded, exit_on_signals

STARTED = (
    b"select started_at from public.processing_jobs where id = %s and completed_at is not null"
)
IDLE = 0.2  # seconds between jobs, so that the worker has gone back to waiting


def measure(url: str) -> float:
    """Insert one job and return the milliseconds from its commit to its start."""
    job_id, committing = insert_with_sql(url, f"{USER_ID}/missing.mp3")
    with psycopg.connect(url, autocommit=True) as conn:
        while (row := conn.execute(STARTED, (job_id,)).fetchone()) is None:
            time.sleep(0.01)
    elapsed: float = (row[0] - committing).total_seconds()
    time.sleep(IDLE)
    return elapsed * 1000


@click.command()
@click.option("--jobs", "count", default=100, show_default=True, type=click.IntRange(2))
def main(count: int) -> None:
    """Measure the pickup latency of an idle worker."""
    exit_on_signals()
    with tempfile.TemporaryDirectory() as folder:
        embedded = Embedded(Path(folder), quiet=True)
        with embedded:
            url = embedded.postgres.url()
            measure(url)  # the first one waits for the worker to come up
            times = sorted(measure(url) for _ in range(count))
        embedded.postgres.remove()
    result = {
        "jobs": count,
        "pickup_ms_median": round(statistics.median(times), 2),
        "pickup_ms_p99": round(statistics.quantiles(times, n=100)[98], 2),
        "pickup_ms_max": round(times[-1], 2),
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
