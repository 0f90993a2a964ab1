"""``pgscribe deploy``: puts the app on Modal, and makes sure that it is what workers call.

Modal tells nobody what a deployed function is made of, so a container of the app is asked: only
its own answer says that one starts, and which code and configuration it has.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import modal
from modal import exception
from modal.config import config as modal_config

from jobs.compute.modal import AWAY, CONNECT_TIMEOUT, DISCARD, MODEL, PREPARE, token
from jobs.errors import DeploymentFailed, SettingsError
from jobs.settings import CallSettings, dotenv
from modal_functions.config import DECODING_SPEED, PREFIX, Config, InvalidConfig
from modal_functions.fingerprint import fingerprint

Say = Callable[[str], None]

DESCRIBE: Final = "describe"
FUNCTIONS: Final = (PREPARE, DISCARD, "transcribe_audio", DESCRIBE)
REPORT: Final = "update_job_status"  # where it is configured

REQUEST_TIMEOUT: Final = 30.0  # seconds
START_TIMEOUT: Final = 300.0  # seconds for a first container, which fetches its image
REPLACEMENT: Final = 60.0  # seconds in which an old container may answer after a deployment
PAUSE: Final = 2.0  # seconds until one is asked again

_REFUSED: Final = (
    exception.AlreadyExistsError,
    exception.InvalidError,
    exception.PermissionDeniedError,
    exception.UnimplementedError,
)


async def run(say: Say, *, check: bool = False, environment: str | None = None) -> None:
    """Deploy, unless it is only to be checked, and see that what is deployed is ours.

    ``say`` gets a line for each step that is done. ``environment`` is Modal's, by default the
    one that Modal's own configuration names. Raises ``SettingsError`` and ``DeploymentFailed``.
    """
    config, notes = settings()
    say(f"settings   app {config.app_name}, GPU {config.gpu}, {_containers(config)}")
    for note in notes:
        say(f"note       {note}")
    environment = environment or modal_config.get("environment")
    where = f"environment {environment}" if environment else "its default environment"
    async with _connected() as client:
        say(f"token      accepted; workspace {await _workspace(client)}, {where}")
        if not check:
            await _deploy(client, environment)
            say(f"deployed   {config.app_name}")
        app = _App(client, config.app_name, environment)
        functions = (*FUNCTIONS, REPORT) if config.supabase_secret else FUNCTIONS
        say(f"found      {', '.join(await app.look_up(functions))}")
        await app.verify(config, patience=0.0 if check else REPLACEMENT)
        say(f"verified   a container started; it has code {fingerprint()} and these settings")


def settings() -> tuple[Config, list[str]]:
    """Read what is to be deployed, and what workers would not expect of it.

    Both come from the environment and from the files that workers read, too: what is only there
    goes into this process's environment, where the app looks. Raises ``SettingsError``.
    """
    for name, value in dotenv(PREFIX).items():
        os.environ.setdefault(name, value)
    try:
        config = Config.load()
    except InvalidConfig as exc:
        raise SettingsError(str(exc)) from exc
    calls = CallSettings.load()
    if problems := [*_contradictions(config, calls)]:
        raise SettingsError("Unusable settings:\n  " + "\n  ".join(problems))
    return config, [*_disagreements(config, calls)]


def _contradictions(config: Config, calls: CallSettings) -> Iterator[str]:
    """Say which calls could not succeed."""
    decoding = calls.max_audio_seconds / DECODING_SPEED
    if config.prepare_timeout < decoding:
        yield (
            f"PGSCRIBE_MODAL_PREPARE_TIMEOUT: must be at least {decoding:g}, not "
            f"{config.prepare_timeout}, as workers take audio of {calls.max_audio_seconds} s. "
            "Raise it, or set PGSCRIBE_MAX_AUDIO_SECONDS here as for the workers."
        )
    for needed, name in (
        (decoding, "PGSCRIBE_MAX_AUDIO_SECONDS"),
        (config.max_span, "PGSCRIBE_MODAL_MAX_SPAN"),
    ):
        if calls.call_timeout < needed:
            yield (
                f"PGSCRIBE_CALL_TIMEOUT: must be at least {needed:g}, not {calls.call_timeout}, to "
                f"have time for what {name} allows. Raise it or lower {name}."
            )


def _disagreements(config: Config, calls: CallSettings) -> Iterator[str]:
    """Say what works as a rule, but not as these settings make one think."""
    for allowed, names in (
        (config.prepare_timeout, "PGSCRIBE_MODAL_PREPARE_TIMEOUT"),
        (
            config.startup_timeout + config.span_timeout,
            "PGSCRIBE_MODAL_STARTUP_TIMEOUT and PGSCRIBE_MODAL_SPAN_TIMEOUT",
        ),
    ):
        if calls.call_timeout < allowed:
            yield (
                f"PGSCRIBE_CALL_TIMEOUT: workers give up on a call after {calls.call_timeout} s, "
                f"although {names} allow {allowed} s."
            )
    if calls.max_audio_seconds > config.max_audio_seconds:
        yield (
            f"PGSCRIBE_MODAL_MAX_AUDIO_SECONDS: {config.max_audio_seconds} s are all that "
            f"transcribe_audio takes; workers take {calls.max_audio_seconds} s."
        )


def _containers(config: Config) -> str:
    return f"up to {config.max_containers} containers with a GPU"


@asynccontextmanager
async def _connected() -> AsyncIterator[modal.Client]:
    """Connect with the token that workers use, and see that Modal takes it."""
    token_id, token_secret = token()
    with _explained("Modal refuses the connection"):
        async with asyncio.timeout(CONNECT_TIMEOUT):
            client = await modal.Client.from_credentials.aio(token_id, token_secret)
    async with client:
        with _explained("Modal refuses the connection"):
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await client.hello.aio()  # type: ignore[no-untyped-call]
        yield client


async def _workspace(client: modal.Client) -> str:
    with _explained("Modal does not say whose token this is"):
        async with asyncio.timeout(REQUEST_TIMEOUT):
            workspace = await modal.Workspace.from_context(client=client).hydrate.aio()
    return workspace.name or "without a name"


async def _deploy(client: modal.Client, environment: str | None) -> None:
    """Deploy, with Modal's own output: building the images for the first time takes minutes."""
    from modal_functions.app import app  # once the environment is complete, which it reads

    with _explained("Modal refuses the deployment"), modal.enable_output():
        await app.deploy.aio(client=client, environment_name=environment)


class _App:
    """The app as workers find it: by name."""

    def __init__(self, client: modal.Client, name: str, environment: str | None) -> None:
        self._name = name
        self._options: dict[str, Any] = {"client": client, "environment_name": environment}

    def _function(self, name: str) -> modal.Function[Any, Any, Any]:
        return modal.Function.from_name(self._name, name, **self._options)

    async def look_up(self, functions: Iterable[str]) -> list[str]:
        """Return the names of all that there is to call. Raises if anything is missing."""
        missing = []
        look_ups: dict[str, Callable[[], Awaitable[object]]] = {
            name: self._function(name).hydrate.aio for name in functions
        }
        look_ups[f"{MODEL}.transcribe"] = self._look_up_method
        for name, look_up in look_ups.items():
            try:
                with _explained("Modal refuses a look-up"):
                    async with asyncio.timeout(REQUEST_TIMEOUT):
                        await look_up()
            except _Missing:
                missing.append(name)
        if len(missing) == len(look_ups):
            raise DeploymentFailed(f"Modal has no app {self._name}; run `pgscribe deploy`.")
        if missing:
            raise DeploymentFailed(
                f"The app {self._name} on Modal is older than this pgscribe, or another one: it "
                f"has no {', '.join(missing)}. Run `pgscribe deploy`."
            )
        return [*look_ups]

    async def _look_up_method(self) -> None:
        model: Any = modal.Cls.from_name(self._name, MODEL, **self._options)
        await model.hydrate.aio()
        await model(engine="faster-whisper", model="base").transcribe.hydrate.aio()

    async def verify(self, config: Config, *, patience: float) -> None:
        """See that a container has our code and settings, within ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while differences := [*_differences(await self._describe(), config)]:
            if time.monotonic() >= deadline:
                raise DeploymentFailed(
                    f"The app {self._name} on Modal is not what would be deployed from here:\n  "
                    + "\n  ".join(differences)
                    + "\nRun `pgscribe deploy`, or take the pgscribe and settings of whoever did."
                )
            await asyncio.sleep(PAUSE)

    async def _describe(self) -> Mapping[str, Any]:
        with _explained("Modal does not take a call"):
            async with asyncio.timeout(REQUEST_TIMEOUT):
                call = await self._function(DESCRIBE).spawn.aio()
        failed = (
            f"A container of the app {self._name} failed; `modal app logs {self._name}` says more"
        )
        try:
            with _explained(failed):
                return await self._answer(call)
        except DeploymentFailed:
            raise
        except Exception as exc:  # what the function raised comes out of the client as it is
            raise DeploymentFailed(f"{failed}: {_in_short(exc)}") from exc

    async def _answer(self, call: Any) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(START_TIMEOUT):
                answer: Mapping[str, Any] = await call.get.aio()
        except TimeoutError as exc:
            raise DeploymentFailed(
                f"No container of the app {self._name} has answered for {START_TIMEOUT:g} s; "
                f"`modal app logs {self._name}` may say why."
            ) from exc
        return answer


def _differences(answer: Mapping[str, Any], config: Config) -> Iterator[str]:
    if (code := answer.get("code")) != fingerprint():
        yield f"code: {code} there, {fingerprint()} here"
    there, here = answer.get("config", {}), config.environment()
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            yield f"{name}: {there.get(name, 'unknown')} there, {here.get(name, 'unknown')} here"


class _Missing(DeploymentFailed):
    """Modal has nothing of that name."""


@contextmanager
def _explained(refused: str) -> Iterator[None]:
    """Turn what the client raises into a sentence and the way out."""
    try:
        yield
    except exception.AuthError as exc:
        raise DeploymentFailed(
            "Modal refuses the token. Make a new one with `modal token new`, or correct "
            "MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, which win over ~/.modal.toml."
        ) from exc
    except exception.ImageBuildError as exc:
        raise DeploymentFailed(
            f"Modal could not build an image; its log is above ({_in_short(exc)})."
        ) from exc
    except exception.VersionError as exc:
        raise DeploymentFailed(
            f"Modal wants another version of its client ({_in_short(exc)}): "
            "`pip install --upgrade modal`."
        ) from exc
    except exception.NotFoundError as exc:
        raise _Missing(f"{refused}: {_in_short(exc)}") from exc
    except _REFUSED as exc:  # before AWAY, which has their base class
        raise DeploymentFailed(f"{refused}: {_in_short(exc)}") from exc
    except AWAY as exc:
        raise DeploymentFailed(
            f"Modal does not answer at {modal_config.get('server_url')} ({_in_short(exc)}). "
            "See whether this network lets it through, and https://status.modal.com."
        ) from exc
    except exception.Error as exc:
        raise DeploymentFailed(f"{refused}: {_in_short(exc)}") from exc


def _in_short(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300].rstrip(".") or type(exc).__name__
