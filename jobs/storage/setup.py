"""``pgscribe setup-storage``: the bucket, its policies, and proof that all of it works."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
import psycopg
from storage3.exceptions import StorageApiError

from jobs.database import CONNECTION_TIMEOUT
from jobs.errors import AudioNotFound, PgscribeError, UploadTooLarge
from jobs.settings import Settings
from jobs.sql import STORAGE
from jobs.storage.choose import supabase_access
from jobs.storage.supabase import SupabaseStorage

Say = Callable[[str], None]

TYPES = ["audio/*", "video/*"]
COMMANDS = ["delete", "insert", "select", "update"]
_PROBE = b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00" + bytes(16)


class StorageNotReady(PgscribeError):
    """The storage is not set up."""

    code = "storage_not_ready"


async def run(settings: Settings, say: Say, *, check: bool = False) -> None:
    """Set the storage up, or only ``check`` it, and say of each step what was done.

    Raises ``StorageNotReady`` and what ``Storage`` raises, with the first step that fails.
    """
    url, key = supabase_access(settings)
    storage = SupabaseStorage(
        url,
        key,
        bucket=settings.supabase_bucket,
        max_bytes=settings.max_upload_bytes,
        locate_seconds=60,
        spool_dir=settings.scratch_dir,
    )
    try:
        say(f"bucket     {await _bucket(storage, settings.max_upload_bytes, check=check)}")
        say(f"policies   {await _policies(settings, check=check)}")
        await _probe(storage, say)
    finally:
        await storage.aclose()


async def _bucket(storage: SupabaseStorage, max_bytes: int, *, check: bool) -> str:
    wanted = {"public": False, "file_size_limit": max_bytes, "allowed_mime_types": TYPES}
    found = await _find(storage)
    actual = {name: getattr(found, name, None) for name in wanted}
    if found is not None and actual == wanted:
        return f"{storage.bucket} is private, for files of at most {max_bytes} bytes"
    if check:
        differs = [name for name in wanted if actual[name] != wanted[name]]
        raise StorageNotReady(
            f"There is no bucket {storage.bucket}; run `pgscribe setup-storage`"
            if found is None
            else f"Bucket {storage.bucket} has another {', '.join(differs)}; run "
            "`pgscribe setup-storage`"
        )
    options: Any = wanted
    try:
        if found is None:
            await storage.ask(lambda: storage.client.create_bucket(storage.bucket, None, options))
            return f"{storage.bucket} made"
        await storage.ask(lambda: storage.client.update_bucket(storage.bucket, options))
    except UploadTooLarge as exc:
        raise StorageNotReady(
            f"PGSCRIBE_MAX_UPLOAD_BYTES: {max_bytes} is more than the project's own limit; lower "
            "it, or raise that under Storage > Settings (the Free plan's is 50 MB)"
        ) from exc
    return f"{storage.bucket} updated"


async def _find(storage: SupabaseStorage) -> Any:
    async def find() -> Any:
        try:
            return await storage.client.get_bucket(storage.bucket)
        except StorageApiError as exc:
            if str(exc.status) == "404" and "bucket" in str(exc.code).lower():
                return None
            raise

    try:
        return await storage.ask(find)
    except AudioNotFound as exc:
        raise StorageNotReady(
            "PGSCRIBE_SUPABASE_URL: no Storage API answers there; give the project's URL, as "
            "https://<ref>.supabase.co"
        ) from exc


async def _policies(settings: Settings, *, check: bool) -> str:
    values = {"bucket": settings.supabase_bucket}
    url = settings.database_url.get_secret_value()
    async with await psycopg.AsyncConnection.connect(
        url, prepare_threshold=None, connect_timeout=int(CONNECTION_TIMEOUT)
    ) as conn:
        problem = None
        if not check:
            row = await (await conn.execute(STORAGE["set_up_storage"], values)).fetchone()
            assert row is not None
            problem = row[1]
        row = await (await conn.execute(STORAGE["storage_policies"], values)).fetchone()
        assert row is not None
    if row[0] != COMMANDS:
        raise StorageNotReady(
            f"{problem or 'Policies on storage.objects are missing.'} Run `pgscribe setup-storage` "
            "with the PGSCRIBE_DATABASE_URL of the Supabase project, as `postgres`"
        )
    return "users reach their own folder only"


async def _probe(storage: SupabaseStorage, say: Say) -> None:
    """Go the way of a recording: upload, play, delete."""
    path = f"pgscribe-probe/{uuid4()}.wav"
    try:
        await _upload(storage, path)
        say("upload     by a signed URL")
        await _play(storage, path)
        say("download   a range, by a signed URL")
    finally:
        deleted = await storage.delete(path)
    if not deleted or await storage.size(path) is not None:
        raise StorageNotReady(f"The probe {path} could not be deleted")
    say("delete     gone")


async def _upload(storage: SupabaseStorage, path: str) -> None:
    ticket = await storage.sign_upload(path, content_type="audio/wav", size=len(_PROBE))
    await _request(storage, "PUT", ticket.url, ticket.headers, content=_PROBE)
    if await storage.size(path) != len(_PROBE):
        raise StorageNotReady("What was uploaded has another size in storage")


async def _play(storage: SupabaseStorage, path: str) -> None:
    url = await storage.sign_download(path, seconds=60)
    response = await _request(storage, "GET", url, {"Range": "bytes=4-11"})
    if response.status_code != httpx.codes.PARTIAL_CONTENT or response.content != _PROBE[4:12]:
        raise StorageNotReady("The storage does not serve ranges, which players need")


async def _request(
    storage: SupabaseStorage, method: str, url: str, headers: dict[str, str], **body: Any
) -> httpx.Response:
    async def request() -> httpx.Response:
        return await storage.http.request(method, url, headers=headers, **body)

    response = await storage.ask(request)
    if not response.is_success:
        raise StorageNotReady(f"A signed URL is answered with HTTP {response.status_code}")
    return response
