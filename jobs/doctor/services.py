"""What is elsewhere: who signs tokens, where audio lies, and Modal."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from jobs.doctor.checks import Context, Finding, fail, in_thread, ok, skipped, together, warn
from jobs.doctor.environment import EXAMPLE_SECRETS
from jobs.doctor.network import Unreachable, reach
from jobs.errors import PgscribeError
from jobs.settings import Settings
from web.jwks import MAX_BYTES, usable_keys

HTTP_TIMEOUT = 5.0  # seconds
LITTLE = 2 * 1024**3  # bytes on a disk below which it is nearly full
NOTHING = 100 * 1024**2  # bytes with which nothing can be done


async def check_tokens(context: Context) -> Finding:
    """See whether users' tokens can be checked: with public keys, a secret, or both."""
    settings = context.settings
    problems = [*_secret_problems(settings)]
    ways = []
    if settings.jwt_secret is not None:
        ways.append("HS256 with PGSCRIBE_JWT_SECRET")
    if settings.signing_keys_url:
        try:
            keys = await _fetch_keys(settings.signing_keys_url)
        except Unreachable as exc:
            problems.append(exc.finding)
        else:
            if keys:
                named = ", ".join(f"{key} ({how})" for key, how in sorted(keys.items()))
                ways.append(f"keys of {urlsplit(settings.signing_keys_url).netloc}: {named}")
            elif settings.jwt_secret is None:
                problems.append(
                    fail(
                        f"{_without_query(settings.signing_keys_url)} has no key that can be used "
                        "(ES256 on P-256, or RS256 of 2048 bits and more)",
                        "Make a signing key under Project Settings > JWT Keys, or set "
                        "PGSCRIBE_JWT_SECRET while the project signs with the legacy secret.",
                    )
                )
    if not ways and not problems:
        problems.append(
            warn(
                "no user's token can be checked: only API keys let anybody in",
                "Set PGSCRIBE_SUPABASE_URL, or PGSCRIBE_JWT_SECRET.",
            )
        )
    issuer = settings.token_issuer or "any"
    return together(problems, ok(f"{'; '.join(ways)}; issuer {issuer}"))


def _secret_problems(settings: Settings) -> Iterator[Finding]:
    secret = settings.jwt_secret.get_secret_value() if settings.jwt_secret else None
    if secret is None:
        return
    if secret in EXAMPLE_SECRETS or len(set(secret)) < 10:  # noqa: PLR2004 - characters
        yield fail(
            "PGSCRIBE_JWT_SECRET is one that everybody knows or guesses: anybody can sign tokens",
            "Make another one, such as by `openssl rand -hex 32`, and give it to Supabase, too.",
        )


async def _fetch_keys(url: str) -> dict[str, str]:
    """Return the algorithm of each key that can be used, by its id. Raises ``Unreachable``."""
    mend = (
        "Correct PGSCRIBE_SUPABASE_URL, which is https://<ref>.supabase.co, or PGSCRIBE_JWKS_URL; "
        "see whether the project is paused."
    )
    shown = _without_query(url)
    try:
        async with httpx2.AsyncClient(timeout=HTTP_TIMEOUT) as client:
            answer = await client.get(url, headers={"Accept": "application/json"})
    except httpx2.HTTPError as exc:
        # Asked only now, as the way may have led through a proxy.
        parts = httpx2.URL(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        await reach(parts.host, port, name="PGSCRIBE_SUPABASE_URL or PGSCRIBE_JWKS_URL")
        raise Unreachable(fail(f"{shown} gives no answer ({_in_short(exc)})", mend)) from exc
    if not answer.is_success:
        raise Unreachable(fail(f"{shown} answers HTTP {answer.status_code}", mend))
    if len(answer.content) > MAX_BYTES:
        raise Unreachable(fail(f"{shown} answers with more than {MAX_BYTES} bytes", mend))
    try:
        keys = usable_keys(json.loads(answer.content))
    except (ValueError, RecursionError) as exc:
        raise Unreachable(fail(f"{shown} gives no JWK set ({_in_short(exc)})", mend)) from exc
    return {key_id: key.algorithm_name for key_id, key in keys.items()}


def _without_query(url: str) -> str:
    """Return what of a URL may be shown: there may be a key in its query."""
    return url.partition("?")[0]


async def check_storage(context: Context) -> Finding:
    """See whether audio can be put where it is to lie, and fetched from there."""
    settings = context.settings
    if settings.storage == "supabase":
        return await _check_bucket(settings)
    finding = await in_thread(
        lambda: check_folder(settings.storage_dir, "PGSCRIBE_STORAGE_DIR", LITTLE)
    )
    if finding.status == "ok" and settings.public_url:
        return await _check_public_url(settings.public_url, finding)
    return finding


async def _check_bucket(settings: Settings) -> Finding:
    from jobs.storage import setup  # slow to import

    said: list[str] = []
    try:
        await setup.run(settings, said.append, check=True)
    except PgscribeError as exc:
        public = "the bucket is public: whoever knows a path hears the recording; "
        text = _in_short(exc)
        return fail(
            f"{public}{text}" if "another public" in text else text,
            "Run `pgscribe setup-storage`; it makes the bucket private, sets its limits and "
            "policies, and tries them.",
        )
    return ok("; ".join(line.split(maxsplit=1)[1] for line in said))


async def _check_public_url(url: str, otherwise: Finding) -> Finding:
    try:
        async with httpx2.AsyncClient(timeout=HTTP_TIMEOUT) as client:
            answer = await client.get(f"{url.rstrip('/')}/healthz")
    except httpx2.HTTPError as exc:
        return warn(
            f"{otherwise.seen}; {url} does not answer from here ({type(exc).__name__})",
            "Links to audio begin with PGSCRIBE_PUBLIC_URL: see whether it is right, and whether "
            "the web server runs.",
        )
    if not answer.is_success:
        return warn(
            f"{otherwise.seen}; {url}/healthz answers HTTP {answer.status_code}",
            "Links to audio begin with PGSCRIBE_PUBLIC_URL: see whether the proxy there leads to "
            "`pgscribe web`.",
        )
    return ok(f"{otherwise.seen}; {url} answers")


def check_folder(folder: Path, setting: str, little: int) -> Finding:
    """See whether a file can be written to a folder, and whether there is room for more."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as exc:
        return fail(
            f"{folder} cannot be written to ({exc.strerror or exc})",
            f"Free its disk, or mend its owner and permissions, or give another one in {setting}.",
        )
    room = f"{folder} has {free / 1024**3:.1f} GB free"
    if free < NOTHING:
        return fail(room, f"Free the disk: audio does not fit any more ({setting}).")
    if free < little:
        return warn(
            f"{room}; {little / 1024**3:.1f} GB are advised",
            f"Free the disk, or give a larger one in {setting}; PGSCRIBE_KEEP_AUDIO_DAYS deletes "
            "old audio.",
        )
    return ok(f"{room} and can be written to")


async def check_modal(context: Context) -> Finding:
    """See whether Modal takes the token, and whether what workers call is there and ours."""
    if context.settings.compute != "modal":
        return skipped("calls run on this machine (PGSCRIBE_COMPUTE=local)")
    said: list[str] = []
    try:
        from jobs import deploy

        await deploy.run(said.append, check=True)
    except PgscribeError as exc:
        return fail(_in_short(exc), "`pgscribe deploy --check` shows each step.")
    except Exception as exc:
        if type(exc).__module__ != "modal.exception":
            raise
        return fail(
            f"Modal's configuration is not usable ({type(exc).__name__})",
            "Correct ~/.modal.toml, or the file that MODAL_CONFIG_PATH names.",
        )
    return ok("; ".join(" ".join(line.split()[1:]) for line in said))


def _in_short(exc: Any) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__
