from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from jobs.storage.supabase import SupabaseStorage
from tests.supabase_storage.server import Bucket, StandIn, serving


@pytest.fixture
def server() -> Iterator[StandIn]:
    """A project with a bucket as `pgscribe setup-storage` makes it, for up to 40 MB."""
    with serving(StandIn()) as state:
        state.buckets["audio"] = Bucket(
            file_size_limit=40_000_000, allowed_mime_types=["audio/*", "video/*"]
        )
        yield state


@pytest.fixture
async def storage(server: StandIn, tmp_path: Path) -> AsyncIterator[SupabaseStorage]:
    storage = make(server, tmp_path)
    yield storage
    await storage.aclose()


def make(
    server: StandIn, folder: Path, *, max_bytes: int = 50_000_000, key: str | None = None
) -> SupabaseStorage:
    return SupabaseStorage(
        server.url,
        key or server.secret_key,
        bucket="audio",
        max_bytes=max_bytes,
        locate_seconds=60,
        spool_dir=folder / "spool",
        pauses=(0.01, 0.02),
    )
