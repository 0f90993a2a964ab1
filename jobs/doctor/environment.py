"""The settings: whether they can be read, and whether they mean what somebody meant."""

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from ipaddress import ip_network
from urllib.parse import urlsplit

import jwt

from jobs.doctor.checks import Context, Finding, fail, ok, together, warn
from jobs.doctor.network import is_near
from jobs.errors import SettingsError
from jobs.settings import ClientSettings, Settings, dotenv
from jobs.storage.choose import make_storage
from modal_functions.config import PREFIX as MODAL_PREFIX
from modal_functions.config import Config

PREFIX = "PGSCRIBE_"
OTHERS = frozenset(  # not settings of this package's processes, but no mistakes either
    [
        f"{MODAL_PREFIX}GPUS",
        "PGSCRIBE_TEST_MODELS_DIR",
        "PGSCRIBE_AUDIO_DIR",
        "PGSCRIBE_WEIGHTS_DIR",
    ]
)
SIMILAR = 0.8
# The one in Supabase's own example for self-hosting, which everybody knows.
EXAMPLE_SECRETS = frozenset(
    [
        "super-secret-jwt-token-with-at-least-32-characters-long",
        "your-super-secret-jwt-token-with-at-least-32-characters-long",
    ]
)
_NO_NAME = re.compile(r"\W")
HERE = frozenset(["localhost", "127.0.0.1", "::1"])


def known_variables() -> set[str]:
    """Return the names of all variables that pgscribe reads."""
    names = {name for model in (Settings, ClientSettings) for name in model.model_fields}
    variables = {f"{PREFIX}{name.upper()}" for name in names}
    return variables | {f"{MODAL_PREFIX}{field.name.upper()}" for field in fields(Config)} | OTHERS


async def check_settings(context: Context) -> Finding:
    """Look at every variable and setting; later checks use what is read here."""
    unknown = [*unknown_variables()]
    try:
        context.loaded = Settings.load()
    except SettingsError as exc:
        problem = fail(
            " ".join(str(exc).split()),
            "Correct these in the environment or in .env; jobs/settings.py describes each one.",
        )
        return together([problem, *unknown], problem)
    settings = context.settings
    return together(
        [*unknown, *_contradictions(settings), *_doubts(settings)],
        ok(f"readable: storage {settings.storage}, compute {settings.compute}"),
    )


def unknown_variables() -> Iterator[Finding]:
    """Yield variables that look like settings and are none: nobody reads them."""
    known = known_variables() | _links_to_services()
    for name in sorted({*os.environ, *dotenv("")} - known):
        begins, *more = _NO_NAME.split(name, maxsplit=1)
        if more and begins.startswith(PREFIX):  # what follows may be a secret
            yield warn(f"a line that begins with {begins} is not read", "Write it NAME=value.")
            continue
        similar = difflib.get_close_matches(name, known, n=1, cutoff=SIMILAR)
        if name.startswith(PREFIX) or (similar and name.startswith("P")):
            meant = f"Did you mean {similar[0]} by {name}?" if similar else f"Remove {name}."
            yield warn(f"{name} is no setting and is not read", meant)


def _links_to_services() -> set[str]:
    """Return what Kubernetes sets in each container, of a service named ``pgscribe-web``."""
    links = tuple(
        name.removesuffix("SERVICE_HOST") + part
        for name in os.environ
        if name.startswith(PREFIX) and name.endswith("_SERVICE_HOST")
        for part in ("SERVICE_", "PORT")
    )
    return {name for name in os.environ if name.startswith(links)}


def _contradictions(settings: Settings) -> Iterator[Finding]:
    """Yield what keeps a web server or a worker from starting, and what gives secrets away."""
    try:
        make_storage(settings, signs=True)
    except SettingsError as exc:
        yield fail(" ".join(str(exc).split()), "Set what is named there, or choose otherwise.")
    if settings.supabase_publishable_key and settings.supabase_url is None:
        yield fail(
            "PGSCRIBE_SUPABASE_PUBLISHABLE_KEY is set without PGSCRIBE_SUPABASE_URL",
            "Set PGSCRIBE_SUPABASE_URL, so that users can sign in.",
        )
    if settings.supabase_publishable_key and _is_secret_key(settings.supabase_publishable_key):
        yield fail(
            "PGSCRIBE_SUPABASE_PUBLISHABLE_KEY is a secret key, which may do anything",
            "Give the publishable (or anon) key there, and make a new secret key.",
        )
    key = settings.supabase_secret_key and settings.supabase_secret_key.get_secret_value()
    if key and _is_publishable_key(key):
        yield fail(
            "PGSCRIBE_SUPABASE_SECRET_KEY is a publishable key, which may do too little",
            "Give the secret (or service_role) key of Project Settings > API Keys.",
        )
    if settings.compute == "modal" and settings.public_url and _is_here(settings.public_url):
        yield fail(
            "PGSCRIBE_PUBLIC_URL is of this machine, which Modal does not reach",
            "Set it to where others reach the REST API, or use PGSCRIBE_STORAGE=supabase.",
        )


def _doubts(settings: Settings) -> Iterator[Finding]:
    """Yield what works, but hardly as it was meant."""
    issuer = settings.token_issuer
    if settings.supabase_url and issuer and not issuer.startswith(settings.supabase_url):
        yield warn(
            "PGSCRIBE_JWT_ISSUER is not of the project that PGSCRIBE_SUPABASE_URL names",
            "Unset PGSCRIBE_JWT_ISSUER unless another service issues the tokens.",
        )
    project = settings.supabase_url
    if project and urlsplit(project).scheme == "http" and not _is_near(project):
        yield warn(
            "PGSCRIBE_SUPABASE_URL is http://: keys and audio pass unencrypted", "Use https://."
        )
    if settings.supabase_secret_key and settings.storage == "local":
        yield warn(
            "PGSCRIBE_SUPABASE_SECRET_KEY is set, but audio lies in a folder",
            "Set PGSCRIBE_STORAGE=supabase, or remove the key from this machine.",
        )
    for network in settings.webhook_networks:
        if network in {ip_network("0.0.0.0/0"), ip_network("::/0")}:
            yield warn(
                f"PGSCRIBE_WEBHOOK_NETWORKS has {network}: users reach all that workers reach",
                "Name only the networks that receivers are in.",
            )


def _role(key: str) -> object:
    """Return the role that a key names which is a token, as those of older projects are."""
    try:
        return jwt.decode(key, options={"verify_signature": False}).get("role")
    except jwt.PyJWTError:
        return None


def _is_secret_key(key: str) -> bool:
    return key.startswith("sb_secret_") or _role(key) == "service_role"


def _is_publishable_key(key: str) -> bool:
    return key.startswith("sb_publishable_") or _role(key) == "anon"


def _is_near(url: str) -> bool:
    return is_near(urlsplit(url).hostname or "")


def _is_here(url: str) -> bool:
    return urlsplit(url).hostname in HERE
