"""Every setting, read from the environment (``PGSCRIBE_…``) or ``.env`` and checked at start."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, DotEnvSettingsSource, NoDecode, SettingsConfigDict

from jobs.errors import SettingsError
from modal_functions.config import NAME, Config

# US dollars a second, as Modal listed them; those of T4, L4, L40S, A100-80GB and H100 were so in
# May 2026 (techbytes.app, "Serverless GPU Pricing Matrix"), the others were not checked.
GPU_PRICES = {
    "T4": 0.000164,
    "L4": 0.000222,
    "A10": 0.000306,
    "A10G": 0.000306,
    "L40S": 0.000542,
    "A100": 0.000583,
    "A100-40GB": 0.000583,
    "A100-80GB": 0.000694,
    "H100": 0.001097,
    "H200": 0.001261,
    "B200": 0.001736,
}


_DEPLOYED = Config()

_ORIGIN = re.compile(
    r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9A-Fa-f:.]+\](:\d{1,5})?|\*"
)

# Of variables that others read: MODAL_TOKEN_SECRET, PGPASSWORD, OTEL_EXPORTER_OTLP_HEADERS, …
_NAMES_A_SECRET = re.compile(
    r"(SECRET|PASSWORD|TOKEN|_HEADERS|(API|SECRET|ACCESS|PRIVATE|ROLE)_KEY)$"
)

# Several values, separated by commas.
Values = Annotated[tuple[str, ...], NoDecode]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode]


class _FromEnvironment(BaseSettings):
    # dev.env is there while `pgscribe dev` runs in this folder; .env and the environment win.
    model_config = SettingsConfigDict(
        env_prefix="PGSCRIBE_", env_file=(".pgscribe/dev.env", ".env"), extra="ignore", frozen=True
    )

    @classmethod
    def load(cls, **overrides: object) -> Self:
        """Read the settings. Raises ``SettingsError`` that names each unusable variable."""
        try:
            return cls(**overrides)
        except UnicodeDecodeError as exc:
            raise SettingsError(
                f".env: is not UTF-8 text ({exc.reason}); save it as such"
            ) from None
        except ValidationError as exc:
            problems = [
                f"PGSCRIBE_{str(error['loc'][0]).upper()}: "
                f"{error['msg'].removeprefix('Value error, ')}"
                f" ({cls.model_fields[str(error['loc'][0])].description})"
                for error in exc.errors(include_input=False)
            ]
            raise SettingsError("Unusable settings:\n  " + "\n  ".join(problems)) from None


def dotenv(prefix: str) -> dict[str, str]:
    """Return the variables with that prefix that the files have which settings are read from."""
    values = DotEnvSettingsSource(_FromEnvironment).env_vars
    named = {name.upper(): value for name, value in values.items() if value is not None}
    return {name: value for name, value in named.items() if name.startswith(prefix)}


class TokenSettings(_FromEnvironment):
    """What it takes to sign and check tokens."""

    jwt_secret: SecretStr | None = Field(
        None, min_length=32, description="Secret that signs HS256 tokens, as Supabase shows it."
    )
    supabase_url: str | None = Field(
        None, description="URL of the Supabase project, https://<ref>.supabase.co."
    )
    jwks_url: str | None = Field(
        None,
        description="URL of the public keys that tokens are checked with (ES256, RS256); by "
        "default <PGSCRIBE_SUPABASE_URL>/auth/v1/.well-known/jwks.json.",
    )
    jwt_audience: str = Field("authenticated", description="Audience that a token must name.")
    jwt_issuer: str | None = Field(
        None,
        description="Issuer that a token must name; by default <PGSCRIBE_SUPABASE_URL>/auth/v1, "
        "and any where that is not set.",
    )

    @field_validator("supabase_url", "jwks_url")
    @classmethod
    def _is_a_url(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Take no URL that could not be fetched, and none with a password."""
        if not value:
            return None
        if info.field_name == "supabase_url" and value.count("/") > len("//") + value.endswith("/"):
            raise ValueError("must be the project's URL, without a path")
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?(\?[^\s#]*)?", value):
            raise ValueError("must be a URL that begins with https:// or http://")
        return value.rstrip("/")

    @property
    def signing_keys_url(self) -> str | None:
        """Where the public keys are, if tokens may be checked with such."""
        if self.jwks_url or not self.supabase_url:
            return self.jwks_url
        return f"{self.supabase_url}/auth/v1/.well-known/jwks.json"

    @property
    def token_issuer(self) -> str | None:
        """The issuer that a token must name, or None for any."""
        if self.jwt_issuer or not self.supabase_url:
            return self.jwt_issuer
        return f"{self.supabase_url}/auth/v1"

    def require_jwt_secret(self) -> str:
        """Return the token secret; raises ``SettingsError`` if there is none."""
        if self.jwt_secret is None:
            raise SettingsError(
                "Unusable settings:\n  PGSCRIBE_JWT_SECRET: needed to sign tokens; Supabase shows "
                "it under Project Settings > JWT Keys (legacy JWT secret)"
            )
        return self.jwt_secret.get_secret_value()


class ServerAddress(_FromEnvironment):
    """Where the server is."""

    url: str = Field("http://127.0.0.1:8000", description="URL of the REST API.")

    @field_validator("url")
    @classmethod
    def _has_a_host(cls, value: str) -> str:
        if not re.match(r"https?://[^\s/?#@]", value):
            raise ValueError("must begin with https:// or http://, such as http://127.0.0.1:8000")
        return value


class ClientSettings(ServerAddress):
    """Where a client finds its server."""

    token: SecretStr = Field(
        description="Bearer token; `pgscribe dev` provides one to commands in its folder, "
        "`pgscribe token` makes one."
    )


class CallSettings(_FromEnvironment):
    """What workers and the app on Modal have to agree on; ``pgscribe deploy`` needs no more."""

    max_audio_seconds: PositiveInt = Field(4 * 3600, description="Longest audio, in seconds.")
    call_timeout: PositiveInt = Field(
        3600, description="Longest that one call may take with its wait for a machine, in seconds."
    )
    modal_app_name: str = Field(
        _DEPLOYED.app_name,
        pattern=f"^{NAME.pattern}$",
        description="Name of the app on Modal, for those who deploy it and for those who call it.",
    )
    modal_gpu: str = Field(
        _DEPLOYED.gpu, description="GPU type that the Modal app is deployed with."
    )

    @field_validator("modal_app_name", "modal_gpu", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: str, info: ValidationInfo) -> str:
        """Take these as the deployment does."""
        assert info.field_name is not None
        default: str = cls.model_fields[info.field_name].default
        return value.strip() or default


def _passwords(database: str) -> Iterator[str]:
    """Yield the password in a URL or a connection string, and what may be part of one."""
    if "://" not in database:
        found = re.search(r"password\s*=\s*(?:'((?:\\.|[^'\\])*)'|(\S+))", database)
        yield from filter(None, found.groups() if found else ())
        # libpq quotes what stands alone, such as the rest of a password with a space.
        yield from (word for word in database.split() if "=" not in word)
        return
    with suppress(ValueError):
        password = urlsplit(database).password
        yield from {password, unquote(password)} if password else ()


class Settings(TokenSettings, CallSettings):
    """What a web server or a worker needs. Secrets stay out of its text representation."""

    database_url: SecretStr = Field(
        description="Direct or session-pooler URL of the database, as `postgres`; `pgscribe dev` "
        "provides it to commands in its folder while it runs."
    )
    database_pool_size: PositiveInt = Field(10, description="Connections per process, at most.")

    rate_limit: NonNegativeInt = Field(
        600,
        description="Requests a minute of one user or API key, counted by each web process for "
        "itself; 0: no limit.",
    )
    failed_rate_limit: NonNegativeInt = Field(
        60,
        description="Requests a minute from one address that say not, or not validly, whose they "
        "are; 0: no limit.",
    )
    max_body_bytes: PositiveInt = Field(
        1024**2, description="Largest body of a request that is no upload, in bytes."
    )
    supabase_publishable_key: str | None = Field(
        None,
        min_length=1,
        description="Publishable key of the project (or its anon key), with which users sign in "
        "to the web app.",
    )
    local_sign_in_password: SecretStr | None = Field(
        None,
        min_length=16,
        description="Password with which `pgscribe dev` lets anybody on this machine sign in to "
        "the web app as any user; refused outside of the embedded environment.",
    )
    session_idle_days: PositiveInt = Field(
        7, le=365, description="Days without use after which a browser has to sign in again."
    )
    session_days: PositiveInt = Field(
        30, le=365, description="Days after which a browser has to sign in again in any case."
    )
    sign_in_rate_limit: NonNegativeInt = Field(
        10,
        description="Attempts to sign in a minute from one address; ten times as many for one "
        "e-mail address. 0: no limit.",
    )
    cors_origins: Values = Field(
        (),
        description="Origins whose pages may use the API from a browser, separated by commas, "
        "such as https://app.example.org; * for all (tokens are never sent by themselves).",
    )
    trusted_proxies: Values = Field(
        (),
        description="Addresses or networks of the proxies whose X-Forwarded-For and "
        "X-Forwarded-Proto are believed, separated by commas; by default none are.",
    )

    storage_dir: Path = Field(
        Path(".pgscribe/storage"), description="Folder that holds the audio (local storage)."
    )
    max_upload_bytes: PositiveInt = Field(2 * 1024**3, description="Largest upload, in bytes.")
    storage: Literal["local", "supabase"] = Field(
        "local", description="Where audio lies: PGSCRIBE_STORAGE_DIR, or Supabase Storage."
    )
    supabase_secret_key: SecretStr | None = Field(
        None, min_length=1, description="Secret key of the project (or its service_role key)."
    )
    supabase_bucket: str = Field(
        "audio", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="Bucket that holds the audio."
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s?#@]+$",
        description="URL under which clients, and Modal, reach the REST API.",
    )
    fetch_timeout: PositiveInt = Field(
        1800, description="Longest that fetching audio by its URL may take, in seconds."
    )

    openai_model: str = Field(
        "base",
        description="Model that stands for OpenAI's own (whisper-1, gpt-4o-transcribe, …) in the "
        "OpenAI-compatible API.",
    )
    openai_wait: PositiveInt = Field(
        3600,
        description="Seconds that a request to the OpenAI-compatible API waits for its job, which "
        "goes on without it.",
    )

    max_streams: PositiveInt = Field(
        2000, description="Streams of events that a web server has open at a time, at most."
    )
    max_streams_per_user: PositiveInt = Field(
        20, description="Streams of events that a user has open at a time on one web server."
    )

    engine: Literal["faster-whisper", "openai-whisper"] = Field(
        "faster-whisper", description="Engine that local transcriptions run on."
    )
    models_dir: Path = Field(
        Path(".pgscribe/models"), description="Folder for weights, one subfolder per engine."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the engine runs.")
    engine_processes: PositiveInt | None = Field(
        None,
        description="Engine processes at most, each with its model in memory once it is needed; "
        "by default one per core up to 4, and one where a GPU is used.",
    )
    engine_threads: PositiveInt | None = Field(
        None, description="Threads per engine process; by default twice its share of the cores."
    )
    scratch_dir: Path = Field(
        Path(".pgscribe/scratch"),
        description="Folder for decoded audio, 115 MB an hour; .pcm files there that are older "
        "than a day are deleted.",
    )

    max_attempts: int = Field(
        3, ge=1, le=20, description="Attempts before a job is failed; its own max_attempts wins."
    )
    job_timeout: PositiveInt = Field(
        4 * 3600, description="Longest that one attempt may take, in seconds."
    )
    stall_timeout: float = Field(
        30.0,
        ge=5,
        le=3600,
        description="Seconds without a heartbeat after which a worker is presumed dead and its "
        "jobs run again; the same for all workers of a database.",
    )
    compute: Literal["local", "modal"] = Field(
        "local", description="Where calls run: this machine's processes, or Modal."
    )
    max_chunks_per_job: PositiveInt = Field(
        20, description="Chunks of one job that are transcribed at a time."
    )
    max_calls: PositiveInt = Field(
        1000, description="Calls that a worker has running at a time, of all its jobs."
    )
    compute_patience: PositiveInt = Field(
        300,
        description="Seconds that the machines that transcribe may be out of reach before an "
        "attempt gives up; what it has started goes on.",
    )
    gpu_prices: dict[str, float] = Field(
        GPU_PRICES, description="Prices of a GPU-second by type, for each job's estimated cost."
    )
    cpu_second_price: float = Field(
        0.0000351,
        ge=0,
        description="Price of a second of a container's 2 cores and 4 GiB; one with a GPU costs "
        "that as well.",
    )
    worker_concurrency: PositiveInt = Field(
        1, description="Jobs at a time per worker; locally they share the engine processes."
    )
    worker_light_slots: PositiveInt = Field(
        10, description="Webhooks and maintenance tasks at a time per worker, beside its jobs."
    )
    worker_health_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port on which a worker answers /healthz, /readyz and /metrics; by default it "
        "listens on none.",
    )
    worker_health_host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address for that; nobody is asked who they are: let no stranger reach it.",
    )
    webhook_networks: Networks = Field(
        (),
        description="Networks that webhooks may go to besides the public internet, on any port, "
        "separated by commas, such as 10.0.0.0/8.",
    )
    keep_webhook_deliveries_days: PositiveInt | None = Field(
        30, description="Days after which the log of a delivered or failed webhook is deleted."
    )
    keep_queue_jobs_days: PositiveInt | None = Field(
        7, description="Days after which the queue job of an ended job is deleted."
    )
    keep_completed_days: PositiveInt | None = Field(
        None, description="Days after which completed jobs are deleted, transcript and all."
    )
    keep_failed_days: PositiveInt | None = Field(
        None, description="Days after which failed jobs are deleted."
    )
    keep_cancelled_days: PositiveInt | None = Field(
        None, description="Days after which cancelled jobs are deleted."
    )
    keep_audio_days: PositiveInt | None = Field(
        None, description="Days after the end of its last job after which audio is deleted."
    )

    log_format: Literal["text", "json"] = Field(
        "text", description="Form of the log: lines for people, or JSON for programs."
    )
    shutdown_timeout: float = Field(
        8.0,
        ge=0,
        description="Seconds that running jobs get to finish after SIGTERM; then they are queued "
        "again. Keep it under the 10 s after which containers are killed.",
    )

    @field_validator("database_url")
    @classmethod
    def _is_of_postgres(cls, value: SecretStr) -> SecretStr:
        """Take no other scheme; the rest libpq knows."""
        url = value.get_secret_value()
        if "://" in url and not re.match(r"postgres(ql)?://|[^:]*=", url):
            raise ValueError("must begin with postgresql://")
        # Libpq would take what is between them for the host, and tell it in each error.
        if re.match(r"postgres(ql)?://[^/?]*@[^/?]*@", url):
            raise ValueError("has two @ before the host; write those of the password as %40")
        return value

    @field_validator("cors_origins", "trusted_proxies", "webhook_networks", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(filter(None, (part.strip() for part in value.split(","))))
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not _ORIGIN.fullmatch(value):
                raise ValueError(f"{value!r} is not an origin; give scheme, host and port, no path")
        return values

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            ip_network(value)
        return values

    @field_validator("keep_audio_days")
    @classmethod
    def _audio_goes_before_its_job(cls, days: int | None, info: ValidationInfo) -> int | None:
        """Refuse to keep audio for longer than the row that names it."""
        for name in ("keep_completed_days", "keep_failed_days", "keep_cancelled_days"):
            kept = info.data.get(name)
            if days is not None and kept is not None and days > kept:
                raise ValueError(
                    f"must be at most PGSCRIBE_{name.upper()} ({kept}), as nothing would be left "
                    "that names the audio"
                )
        return days

    def secrets(self) -> Iterator[str]:
        """Yield what must not get into a log."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                yield value.get_secret_value()
        yield from _passwords(self.database_url.get_secret_value())
        for name, value in os.environ.items():
            if _NAMES_A_SECRET.search(name):
                yield value
            if name.endswith("_HEADERS"):  # name=value,…; values are percent-encoded
                for header in value.split(","):
                    secret = header.partition("=")[2].strip()
                    yield from (secret, unquote(secret))

    @property
    def gpu(self) -> str:
        """The GPU that the Modal app has: of several kinds the first; `local` without Modal."""
        if self.compute == "local":
            return "local"
        return self._modal_gpu

    @property
    def _modal_gpu(self) -> str:
        return self.modal_gpu.split(",")[0].strip().upper().removesuffix("!").removesuffix("+")

    @property
    def gpu_second_price(self) -> float:
        """Price of a second on a machine with the GPU that the Modal app has.

        A GPU whose price is unknown counts as free; of several kinds the first counts.
        """
        return self.gpu_prices.get(self._modal_gpu, 0.0) + self.cpu_second_price
