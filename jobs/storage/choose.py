"""The storage that the settings name."""

from jobs.errors import SettingsError
from jobs.settings import Settings
from jobs.storage.base import Storage
from jobs.storage.links import LinkSigner
from jobs.storage.local import LocalStorage


def make_storage(settings: Settings, *, signs: bool = False) -> Storage:
    """Return the storage; close it with ``aclose``. Raises ``SettingsError``.

    ``signs``: links are asked of it, so it must be able to sign them.
    """
    return _supabase(settings) if settings.storage == "supabase" else _local(settings, signs=signs)


def _local(settings: Settings, *, signs: bool) -> Storage:
    if signs and settings.jwt_secret is None:
        raise SettingsError(
            "Unusable settings:\n  PGSCRIBE_JWT_SECRET: needed to sign the links by which local "
            "audio is uploaded and played, also where users' tokens are signed by others; set it "
            "to a random secret of 32 characters or more, or use PGSCRIBE_STORAGE=supabase"
        )
    by_link = settings.compute == "modal"
    if by_link and (settings.public_url is None or settings.jwt_secret is None):
        raise SettingsError(
            "Unusable settings:\n  PGSCRIBE_STORAGE: Modal has no access to the folder of local "
            "storage. Use PGSCRIBE_STORAGE=supabase, or set PGSCRIBE_PUBLIC_URL to where Modal "
            "reaches this REST API, and PGSCRIBE_JWT_SECRET as the web server has it"
        )
    secret = settings.jwt_secret
    return LocalStorage(
        settings.storage_dir,
        max_bytes=settings.max_upload_bytes,
        links=LinkSigner(secret.get_secret_value()) if secret else None,
        public_url=settings.public_url or "",
        locate_seconds=settings.call_timeout if by_link else None,
    )


def _supabase(settings: Settings) -> Storage:
    from jobs.storage.supabase import SupabaseStorage  # slow to import

    url, key = supabase_access(settings)
    return SupabaseStorage(
        url,
        key,
        bucket=settings.supabase_bucket,
        max_bytes=settings.max_upload_bytes,
        locate_seconds=settings.call_timeout,
        spool_dir=settings.scratch_dir,
    )


def supabase_access(settings: Settings) -> tuple[str, str]:
    """Return the project's URL and secret key. Raises ``SettingsError``."""
    if settings.supabase_url is None or settings.supabase_secret_key is None:
        raise SettingsError(
            "Unusable settings:\n  PGSCRIBE_SUPABASE_URL, PGSCRIBE_SUPABASE_SECRET_KEY: needed for "
            "PGSCRIBE_STORAGE=supabase; Supabase shows them under Project Settings > API Keys"
        )
    return settings.supabase_url, settings.supabase_secret_key.get_secret_value()
