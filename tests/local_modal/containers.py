"""Containers: processes that run Modal's container entrypoint against this server."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping
from pathlib import Path

from modal_proto import api_pb2 as pb

from tests.local_modal.call import Call
from tests.local_modal.deployments import Deployed, Deployments
from tests.local_modal.settings import Settings, new_id

CONTAINER_PROCESS = Path(__file__).with_name("container_process.py")
REPO = Path(__file__).parents[2]
TASK_HEADER = "x-local-modal-task"


def clean_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment without what would tell a Modal client who it is."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
    path = os.pathsep.join([str(REPO), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path, "MODAL_CONFIG_PATH": os.devnull} | variables


class Container:
    """A container of one function. It has at most one input at a time."""

    def __init__(self, function: Deployed) -> None:
        self.function = function
        self.task_id = new_id("ta")
        self.process: Process | None = None
        self.call: Call | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.ready = False  # it has asked for input
        self.leaving = False  # it has been told to end, or has had its only input
        self.killed = ""  # why, if the server did it
        self.failure: pb.GenericResult | None = None  # as it has reported of its start
        self._cancelled: list[str] = []
        self._cancellation = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    @property
    def will_ask(self) -> bool:
        """Whether it is going to ask for input without being waited for."""
        return self.call is None and not self.leaving and not self.killed

    def kill(self, reason: str) -> None:
        """Kill the process and what it has started; also one that is only about to start."""
        self.killed = self.killed or reason
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def release(self) -> None:
        """Say that the input is no longer its own."""
        self.call = None
        if self.timer is not None:
            self.timer.cancel()

    def ask_to_cancel(self, call: Call) -> None:
        self._cancelled.append(call.input_id)
        self._cancellation.set()

    async def cancellations(self, seconds: float) -> list[str]:
        """Wait for inputs to cancel."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._cancellation.wait()
        self._cancellation.clear()
        input_ids, self._cancelled = self._cancelled, []
        return input_ids


class Launcher:
    """Starts containers. ``server_url`` must be set once the server knows its port."""

    def __init__(self, settings: Settings, deployments: Deployments, folder: Path) -> None:
        self.server_url = ""
        self._settings = settings
        self._deployments = deployments
        self._folder = folder

    def log(self, task_id: str) -> str:
        return (self._folder / f"{task_id}.log").read_text(errors="replace")

    async def launch(self, container: Container) -> None:
        arguments = self._folder / f"{container.task_id}.arguments"
        arguments.write_bytes(self._arguments(container).SerializeToString())
        with (self._folder / f"{container.task_id}.log").open("wb") as log:
            container.process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(CONTAINER_PROCESS),
                stdin=PIPE,
                stdout=log,
                stderr=log,
                env=self._environment(container, arguments),
                start_new_session=True,
            )
        if container.killed:
            container.kill(container.killed)

    def _environment(self, container: Container, arguments: Path) -> Mapping[str, str]:
        return clean_environment(
            **self._deployments.image_environment(container.function),
            MODAL_SERVER_URL=self.server_url,
            MODAL_IS_REMOTE="1",
            MODAL_TASK_ID=container.task_id,
            MODAL_CONTAINER_ARGUMENTS_PATH=str(arguments),
            MODAL_OVERRIDE_HEADERS=f"{TASK_HEADER}:{container.task_id}",
            PYTHONUNBUFFERED="1",
        ) | dict(self._settings.container_environment)

    def _arguments(self, container: Container) -> pb.ContainerArguments:
        function = container.function
        definition = pb.Function()
        definition.CopyFrom(function.definition)
        definition.max_concurrent_inputs = definition.target_concurrent_inputs = (
            1  # whatever @modal.concurrent allows: see the README
        )
        return pb.ContainerArguments(
            task_id=container.task_id,
            function_id=function.function_id,
            app_id=function.app_id,
            function_def=definition,
            serialized_params=function.serialized_params,
            app_layout=self._deployments.layout(function.app_id),
            environment_name="main",
        )


async def deploy(settings: Settings, server_url: str) -> None:
    """Run the real `modal deploy` of the settings' apps and functions, in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.local_modal.deploy_process",
        settings.to_json(),
        cwd=REPO,
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=clean_environment(
            MODAL_SERVER_URL=server_url,
            MODAL_TOKEN_ID=settings.token_id,
            MODAL_TOKEN_SECRET=settings.token_secret,
        ),
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"The deployment failed:\n{output.decode(errors='replace')}")
