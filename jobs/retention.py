"""What is kept how long: old queue jobs, jobs and audio are deleted in batches."""

import asyncio
import logging

from jobs.database import Pool
from jobs.settings import Settings
from jobs.sql import RETENTION
from jobs.storage.base import Storage

logger = logging.getLogger(__name__)

AUDIO_BATCH = 100  # files a minute are deleted at the same time
BATCH = 1000  # rows a transaction: short enough that nobody waits for it


async def prune(pool: Pool, storage: Storage, settings: Settings) -> dict[str, int]:
    """Delete what the settings no longer keep and return how much of each kind that was.

    Several workers may do this at once; each kind is pruned by one of them at a time. Raises
    ``StorageUnavailable`` before any job is deleted, as nothing else names the audio.
    """
    ages = {
        "completed": settings.keep_completed_days,
        "failed": settings.keep_failed_days,
        "cancelled": settings.keep_cancelled_days,
    }
    pruned = {}
    if settings.keep_queue_jobs_days is not None:
        pruned["queue_jobs"] = await _prune_rows(pool, "queue_jobs", settings.keep_queue_jobs_days)
    if settings.keep_audio_days is not None:
        pruned["audio"] = await _prune_audio(pool, storage, settings.keep_audio_days)
    if settings.keep_webhook_deliveries_days is not None:
        pruned["webhook_deliveries"] = await _prune_rows(
            pool, "webhook_deliveries", settings.keep_webhook_deliveries_days
        )
    for what, days in ages.items():
        if days is not None:
            pruned[what] = await _prune_rows(pool, what, days)
    logger.info("Pruned %s", pruned)
    return pruned


async def _prune_rows(pool: Pool, what: str, days: int) -> int:
    total = 0
    while True:
        async with pool.connection() as conn:
            cursor = await conn.execute(
                RETENTION["prune"], {"what": what, "days": days, "batch": BATCH}
            )
            row = await cursor.fetchone()
        assert row is not None
        pruned: int = row[0]
        total += pruned
        if pruned < BATCH:
            return total


async def _prune_audio(pool: Pool, storage: Storage, days: int) -> int:
    total = 0
    while True:
        async with pool.connection() as conn:
            cursor = await conn.execute(RETENTION["expired_audio"], {"days": days, "batch": BATCH})
            row = await cursor.fetchone()
        assert row is not None
        paths, reached = row
        if reached is None:
            return total
        for path in paths:
            try:
                total += await storage.delete(path)
            except OSError as exc:  # the others can go all the same
                logger.warning("Audio %s could not be deleted: %s", path, exc)
        async with pool.connection() as conn:
            await conn.execute(RETENTION["audio_pruned"], {"reached": reached})


async def delete_audio(pool: Pool, storage: Storage) -> int:
    """Delete the audio of deleted jobs that nobody needs any more, and return how many files.

    What can't be deleted now is tried again the next time, after the others.
    """
    async with pool.connection() as conn:
        cursor = await conn.execute(RETENTION["audio_to_delete"], {"batch": AUDIO_BATCH})
        row = await cursor.fetchone()
    assert row is not None
    paths: list[str] = row[0]
    answers = await asyncio.gather(*map(storage.delete, paths), return_exceptions=True)
    gone = []
    for path, answer in zip(paths, answers, strict=True):
        if isinstance(answer, BaseException):
            logger.warning("Audio %s could not be deleted: %s", path, answer)
        else:  # false says that it was gone already
            gone.append(path)
    if gone:
        async with pool.connection() as conn:
            await conn.execute(RETENTION["forget_deleted_audio"], {"paths": gone})
    return len(gone)


async def add_up_usage(pool: Pool) -> None:
    """Add what jobs have used to what their owners have used this month."""
    async with pool.connection() as conn:
        await conn.execute(RETENTION["add_up_usage"])
