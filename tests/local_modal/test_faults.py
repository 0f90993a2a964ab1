"""What happens to calls besides errors: preempted, started twice, answered too late."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import modal
import pytest

from tests.local_modal.control import Refused
from tests.local_modal.sample_app import APP
from tests.local_modal.server import Address, in_thread
from tests.local_modal.settings import Settings

pytestmark = pytest.mark.anyio

PATIENCE = 60.0


class Server(NamedTuple):
    address: Address
    client: modal.Client


def function(client: modal.Client, name: str) -> "modal.Function[Any, Any, Any]":
    return modal.Function.from_name("sample", name, client=client)


async def test_a_preempted_call_starts_again_with_the_same_input(
    local_modal: Address, modal_client: modal.Client, tmp_path: Path
) -> None:
    control = local_modal.control
    call = await function(modal_client, "wait_for").spawn.aio(str(tmp_path / "go"))
    (first,) = control.wait("started", call_id=call.object_id)
    control.preempt(call.object_id)
    first, second = control.wait("started", 2, call_id=call.object_id)
    (tmp_path / "go").touch()
    assert await call.get.aio(timeout=PATIENCE) == second["pid"]
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert len(control.events("output", call_id=call.object_id)) == 1
    (ended,) = control.wait("container ended", pid=first["pid"])
    assert ended["killed"] == "preempted"


async def test_only_what_runs_is_preempted(
    local_modal: Address, modal_client: modal.Client
) -> None:
    call = await function(modal_client, "double").spawn.aio(1)
    await call.get.aio(timeout=PATIENCE)
    with pytest.raises(Refused):
        local_modal.control.preempt(call.object_id)


async def test_a_crashed_call_starts_again(
    local_modal: Address, modal_client: modal.Client, tmp_path: Path
) -> None:
    call = await function(modal_client, "wait_for").spawn.aio(str(tmp_path / "go"))
    for crash in range(1, 3):
        starts = local_modal.control.wait("started", crash, call_id=call.object_id)
        os.kill(starts[-1]["pid"], signal.SIGKILL)
    (tmp_path / "go").touch()
    assert await call.get.aio(timeout=PATIENCE)
    assert len(local_modal.control.events("started", call_id=call.object_id)) == 3


@contextlib.asynccontextmanager
async def serving(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> AsyncIterator[Server]:
    """Serve the sample app with settings of the test's own."""
    with in_thread(settings) as server:
        monkeypatch.setenv("MODAL_SERVER_URL", server.url)
        async with await modal.Client.from_credentials.aio("ak-local", "as-local") as client:
            yield Server(server, client)


async def test_crashes_can_be_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, Settings(apps=(APP,), max_crashes=1)) as server:
        call = await function(server.client, "die").spawn.aio()
        with pytest.raises(modal.exception.RemoteError):
            await call.get.aio(timeout=PATIENCE)
        assert len(server.address.control.events("started")) == 2


async def test_results_can_age(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(monkeypatch, Settings(apps=(APP,), result_ttl=0.0)) as server:
        call = await function(server.client, "double").spawn.aio(1)
        server.address.control.wait("finished")
        with pytest.raises(modal.exception.OutputExpiredError):
            await call.get.aio(timeout=0)


@pytest.mark.parametrize("status", ["UNAVAILABLE", "CUT"])
async def test_a_spawn_whose_response_was_lost_is_not_performed_twice(
    local_modal: Address, modal_client: modal.Client, status: str
) -> None:
    control = local_modal.control
    control.fail("FunctionMap", status, when="after", delay=0.1)
    call = await function(modal_client, "double").spawn.aio(21)
    assert await call.get.aio(timeout=PATIENCE) == 42
    assert control.requests()["FunctionMap"] == 2
    assert len(control.events("spawned")) == len(control.events("started")) == 1


async def test_a_spawn_that_is_given_up_may_have_been_performed(
    local_modal: Address, modal_client: modal.Client
) -> None:
    """That is why ids are stored before anyone waits, and why a call can still be a duplicate."""
    control = local_modal.control
    control.fail("FunctionMap", "UNAVAILABLE", when="after", times=4)
    with pytest.raises(modal.exception.ServiceError):
        await function(modal_client, "double").spawn.aio(21)
    (orphan,) = control.events("spawned")
    await function(modal_client, "double").remote.aio(21)
    first, second = control.events("spawned")
    assert first == orphan
    assert first["call_id"] != second["call_id"]
    assert first["arguments_sha256"] == second["arguments_sha256"]


async def test_a_client_holds_back_what_the_connection_has_no_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Enough long polls, and even a cancel waits for one of them to end."""
    async with serving(monkeypatch, Settings(apps=(APP,), streams=2)) as server:
        control = server.address.control
        control.pause()
        calls = [await function(server.client, "double").spawn.aio(n) for n in range(3)]
        polls = [asyncio.create_task(call.get.aio(timeout=PATIENCE)) for call in calls[:2]]
        await asyncio.to_thread(control.wait_for_requests, "FunctionGetOutputs", 2)
        cancel = asyncio.create_task(calls[2].cancel.aio())
        done, _ = await asyncio.wait([cancel], timeout=0.5)
        assert not done
        assert "FunctionCallCancel" not in control.requests()
        control.resume()
        assert await asyncio.gather(*polls) == [0, 2]
        await cancel


async def test_nothing_starts_while_it_is_paused(
    local_modal: Address, modal_client: modal.Client
) -> None:
    local_modal.control.pause()
    call = await function(modal_client, "double").spawn.aio(21)
    with pytest.raises(TimeoutError):
        await call.get.aio(timeout=0.2)
    (waiting,) = local_modal.control.calls()
    assert (waiting["status"], waiting["starts"]) == ("queued", 0)
    local_modal.control.resume()
    assert await call.get.aio(timeout=PATIENCE) == 42


async def test_reset_forgets(local_modal: Address, modal_client: modal.Client) -> None:
    control = local_modal.control
    control.fail("FunctionMap", "INTERNAL")
    call = await function(modal_client, "wait_for").spawn.aio("/nonexistent")
    (start,) = control.wait("started", call_id=call.object_id)
    control.reset()
    assert control.calls() == []
    control.wait("container ended", pid=start["pid"])
    with pytest.raises(modal.exception.NotFoundError):
        await call.get.aio(timeout=PATIENCE)


async def test_an_unknown_command_is_refused(local_modal: Address) -> None:
    with pytest.raises(Refused):
        local_modal.control.end("fc-none", "TIMEOUT")
    with pytest.raises(Refused):
        local_modal.control._do("explode")  # noqa: SLF001 -- no public method does
