"""What a scrape costs: ``python -m benchmarks.metrics``.

One web server and one embedded Postgres of the benchmark's own; an operator asks for ``/metrics``
over a socket, each time with figures read anew. The database has a million jobs that have ended
and 100,000 that wait, of a thousand owners.

- figures_ms: ``operator_metrics`` in the database.
- scrape_ms: the whole of ``GET /metrics``, with figures read anew.
- cached_ms: the same within the seconds for which figures are told again.

Figures are medians. The last line is one JSON object.
"""

import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import click
import httpx2
import psycopg
import uvicorn

from db import migrate
from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs.dev import exit_on_signals, free_port
from jobs.settings import Settings
from web.app import create_app
from web.auth import issue_token
from web.routes import metrics

OWNERS = [UUID(int=number) for number in range(1, 1001)]
ENDED = """
with ended as (
  select gen_random_uuid() as id, n, now() - interval '20 days' * (1 - n::float8 / %(count)s) as at
    from generate_series(1, %(count)s) n)
insert into public.processing_jobs
  (id, user_id, file_path, job_id, status, progress, attempt, started_at, completed_at, created_at,
   result)
select id, (%(owners)s::uuid[])[1 + n %% cardinality(%(owners)s::uuid[])], 'a/b.mp3', n::text,
       'completed', 1, 1, at, at, at, '{}' from ended
"""


def fill(server: EmbeddedPostgres, ended: int, waiting: int) -> None:
    """Make the jobs."""
    migrate.migrate(server.url())
    with psycopg.connect(server.url(user=SUPERUSER), autocommit=True) as conn:
        conn.execute(
            "insert into auth.users (id, email) select id, id::text from unnest(%s) id", (OWNERS,)
        )
        conn.execute("insert into pgscribe.operators (user_id) values (%s)", (OWNERS[0],))
        conn.execute("set session_replication_role = replica")
        conn.execute(ENDED.encode(), {"count": ended, "owners": OWNERS})
        conn.execute("set session_replication_role = origin")
        conn.execute("select setval('procrastinate.procrastinate_jobs_id_seq', %s)", (ended,))
        conn.execute("select limit_owners(max_queued => 1000000)")
        conn.execute(
            "insert into public.processing_jobs (user_id, file_path) select"
            " (%(owners)s::uuid[])[1 + n %% cardinality(%(owners)s::uuid[])], 'a/b.mp3'"
            " from generate_series(1, %(count)s) n",
            {"count": waiting, "owners": OWNERS},
        )
        conn.execute("analyze")


def median(step: Callable[[], object], rounds: int) -> float:
    """Return the median of what a step takes, in milliseconds."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return round(statistics.median(times) * 1000, 2)


@click.command()
@click.option("--ended", default=1_000_000, show_default=True, type=click.IntRange(1))
@click.option("--waiting", default=100_000, show_default=True, type=click.IntRange(0))
@click.option("--rounds", default=21, show_default=True, type=click.IntRange(1))
def main(ended: int, waiting: int, rounds: int) -> None:
    """Measure what a scrape costs."""
    exit_on_signals()
    with tempfile.TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder, "pg")) as server:
        fill(server, ended, waiting)
        settings = Settings.load(
            database_url=server.url(), jwt_secret="x" * 32, storage_dir=Path(folder), rate_limit=0
        )
        token = issue_token(settings, OWNERS[0], lifetime=3600)
        port = free_port()
        web = uvicorn.Server(
            uvicorn.Config(create_app(settings), port=port, log_config=None, ws="none")
        )
        thread = threading.Thread(target=web.run)
        thread.start()
        headers = {"Authorization": f"Bearer {token}"}
        with (
            psycopg.connect(server.url(), autocommit=True) as conn,
            httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=headers) as http,
        ):
            claims = json.dumps({"sub": str(OWNERS[0])})
            conn.execute("select set_config('request.jwt.claims', %s, false)", (claims,))
            while not web.started:
                time.sleep(0.01)
            result = {
                "ended": ended,
                "waiting": waiting,
                "figures_ms": median(
                    lambda: conn.execute("select public.operator_metrics()"), rounds
                ),
                "cached_ms": median(lambda: http.get("/metrics").raise_for_status(), rounds),
            }
            metrics.FRESH = 0.0
            result["scrape_ms"] = median(lambda: http.get("/metrics").raise_for_status(), rounds)
        web.should_exit = True
        thread.join()
        server.remove()
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
