"""What the dashboard's views take: ``python -m benchmarks.inspection``.

A million jobs of 500 owners lie in an embedded Postgres of the benchmark's own; 5,000 wait and 50
run. Figures are medians of the rounds, in milliseconds. The last line is one JSON object.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import psycopg

from db import migrate, named_queries
from db.embedded import SUPERUSER, EmbeddedPostgres

OWNER = UUID(int=1)
QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))
KINDS = ("measure_", "owner_")


def fill(server: EmbeddedPostgres, jobs: int) -> None:
    """Make the jobs."""
    values = {"owner": OWNER, "jobs": jobs}
    with psycopg.connect(server.url(user=SUPERUSER), autocommit=True) as admin:
        with admin.transaction():
            admin.execute("set local session_replication_role = replica")
            admin.execute(QUERIES["fill"], values)
        admin.execute(QUERIES["move_sequence"], values)
    with psycopg.connect(server.url(), autocommit=True) as conn:
        for step in ("allow", "submit"):
            conn.execute(QUERIES[step])
        row = conn.execute(QUERIES["register"]).fetchone()
        assert row is not None
        conn.execute(QUERIES["start"], {"worker": row[0]})
        conn.execute(QUERIES["operate"], values)
        conn.execute(QUERIES["tidy"])


def measure(conn: psycopg.Connection[Any], name: str) -> float:
    """Return how many milliseconds a query takes."""
    values = {"owner": OWNER}
    with conn.transaction():
        if name.startswith("owner_"):
            conn.execute(QUERIES["act_as"], values)
        began = time.perf_counter()
        rows = conn.execute(QUERIES[name], values).fetchall()
        took = time.perf_counter() - began
    assert rows, name
    return took * 1000


@click.command()
@click.option("--rounds", default=20, show_default=True)
@click.option("--jobs", default=1_000_000, show_default=True)
def main(rounds: int, jobs: int) -> None:
    """Measure what the dashboard asks for."""
    names = [name for name in QUERIES if name.startswith(KINDS)]
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder) / "postgres")
        try:
            server.start()
            migrate.migrate(server.url())
            fill(server, jobs)
            with psycopg.connect(server.url(), autocommit=True) as conn:
                times = {name: [measure(conn, name) for _ in range(rounds)] for name in names}
        finally:
            server.remove()
    medians = {name: round(statistics.median(times[name]), 2) for name in names}
    for name, milliseconds in medians.items():
        click.echo(f"{milliseconds:8.1f}  {name}")
    click.echo(json.dumps(medians))


if __name__ == "__main__":
    main()
