"""Clients and servers as processes: what outlives whom."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.local_modal.containers import REPO, clean_environment
from tests.local_modal.control import Control
from tests.local_modal.sample_app import APP
from tests.local_modal.server import ServerProcess
from tests.local_modal.settings import Settings

PATIENCE = 60.0
IN_FLIGHT = 1000

Client = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess.started(Settings(apps=(APP,))) as process:
        yield process


@pytest.fixture
def control(server: ServerProcess) -> Iterator[Control]:
    yield server.control
    server.control.reset()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    """Start a client process that does something."""
    with ExitStack() as stack:

        def start(*arguments: str) -> "subprocess.Popen[str]":
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.local_modal.client_process", *arguments],
                    cwd=REPO,
                    env=clean_environment(**server.environment()),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield start


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def until_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"{pid} is still there"
        time.sleep(0.02)


def test_another_process_gets_what_a_killed_one_has_spawned(
    control: Control, client: Client, tmp_path: Path
) -> None:
    first = client("spawn", "wait_for", str(tmp_path / "go"))
    call_id = line(first)
    (start,) = control.wait("started", call_id=call_id)
    first.send_signal(signal.SIGKILL)
    first.wait(PATIENCE)
    second = client("fetch", call_id)
    (tmp_path / "go").touch()
    assert line(second) == str(start["pid"])
    assert len(control.events("started", call_id=call_id)) == 1


def test_a_thousand_calls_are_in_flight_in_one_client(control: Control, client: Client) -> None:
    control.pause()
    process = client("many", str(IN_FLIGHT))
    control.wait_for_requests("FunctionGetOutputs", IN_FLIGHT)
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    before, during, spawning, cpu = map(float, line(process).split())
    print(  # noqa: T201 -- a measurement; pytest -rP shows it
        f"{IN_FLIGHT} gets: {before:.0f} -> {during:.0f} MiB, spawned in {spawning:.1f} s,"
        f" {cpu:.2f} s of CPU in a second of waiting"
    )
    assert sum(call["status"] == "queued" for call in control.calls()) == IN_FLIGHT
    assert during - before < 200
    control.resume()
    assert line(process) == str(sum(range(IN_FLIGHT)))
    assert len(control.events("started")) == IN_FLIGHT


def test_containers_end_with_their_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed server leaves its folder behind
    with ServerProcess.started(Settings(apps=(APP,))) as server:
        command = [sys.executable, "-m", "tests.local_modal.client_process"]
        with subprocess.Popen(
            [*command, "spawn", "wait_for", str(tmp_path / "never")],
            cwd=REPO,
            env=clean_environment(**server.environment()),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # it complains of the dead server
        ) as process:
            (start,) = server.control.wait("started")
            os.kill(server.pid, signal.SIGKILL)
            until_gone(start["pid"])
            process.kill()


def test_the_command_line_takes_apps_functions_and_a_port() -> None:
    arguments = ["--app", APP, "--function", "plain/dumps=json:dumps", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.local_modal", *arguments],
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        address = ServerProcess(process)
        assert address.url.startswith("http://127.0.0.1:")
        assert address.control.calls() == []
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0


def test_an_app_that_cannot_be_deployed_is_an_error() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.local_modal", "--app", "json:dumps"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert process.returncode != 0
    assert "json:dumps is no modal.App" in process.stderr
