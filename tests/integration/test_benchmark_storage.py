"""The jobs of ``benchmarks.storage`` go the way that real ones go."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from benchmarks import storage
from benchmarks.postgres import OWNERS, Postgres

pytestmark = pytest.mark.anyio


class OneDatabase(Postgres):
    """The test's database, instead of a server of its own."""

    def __init__(self, url: str) -> None:
        self._url = url

    def url(self, database: str, *, superuser: bool = False) -> str:
        del database, superuser
        return self._url

    @contextmanager
    def fresh(self, template: str = "pgscribe") -> Iterator[str]:
        yield template


async def test_a_transcript_leaves_what_the_product_keeps(database: str) -> None:
    with psycopg.connect(database, autocommit=True) as conn:
        conn.execute("insert into auth.users (id) select unnest(%s::uuid[])", (OWNERS,))
    figures = await storage.life(OneDatabase(database), storage.MINUTE, 10)
    with psycopg.connect(database, autocommit=True) as conn:
        kept = conn.execute(
            "select count(*), min(length(result ->> 'text')) > 500, bool_and(status = 'completed'),"
            " bool_and(usage is not null), sum(cardinality(peaks))"
            " from processing_jobs join processing_job_waveforms w on w.job_id = processing_jobs.id"
        ).fetchone()
        assert kept == (10, True, True, True, 10 * 2000)
        chunks = "select count(*), count(result) from processing_job_chunks"
        assert conn.execute(chunks).fetchone() == (10, 10)
        async with storage.jobs(OneDatabase(database)) as queue:
            await queue.prune()
        assert conn.execute(chunks).fetchone() == (0, 0)
    per_job = {name: values[storage.MINUTE] for name, values in figures.items()}
    assert per_job["storage-bytes"] >= sum(
        per_job[f"storage-bytes-{part}"] for part in storage.TABLES
    )
    assert per_job["storage-bytes-jobs"] > 5
    assert per_job["storage-wal"] > 10
    assert per_job["storage-dead"] > 5
