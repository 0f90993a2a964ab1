"""The unpatched client calls functions, which really run: what it gets back."""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modal
import pytest

from tests.local_modal.sample_app import Fault
from tests.local_modal.server import Address

pytestmark = pytest.mark.anyio

PATIENCE = 60.0
MEGABYTES = 3 * 2**20

Look = Callable[[str], "modal.Function[Any, Any, Any]"]


@pytest.fixture
def look(modal_client: modal.Client) -> Look:
    def look_up(name: str) -> "modal.Function[Any, Any, Any]":
        return modal.Function.from_name("sample", name, client=modal_client)

    return look_up


@pytest.fixture
def model(modal_client: modal.Client) -> modal.Cls:
    return modal.Cls.from_name("sample", "Model", client=modal_client)


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


async def test_a_spawned_call_runs_in_another_process(look: Look) -> None:
    call = await look("pid").spawn.aio()
    assert await call.get.aio(timeout=PATIENCE) != os.getpid()


async def test_remote_returns_the_result(look: Look) -> None:
    assert await look("double").remote.aio(21) == 42


async def test_an_asynchronous_function_runs(look: Look) -> None:
    assert await look("echo").remote.aio({"a": [1]}) == {"a": [1]}


async def test_a_result_is_fetched_by_its_id_and_more_than_once(
    look: Look, modal_client: modal.Client
) -> None:
    call_id = (await look("double").spawn.aio(1)).object_id
    call = modal.FunctionCall.from_id(call_id, modal_client)
    assert await call.get.aio(timeout=PATIENCE) == 2
    assert await call.get.aio(timeout=PATIENCE) == 2
    assert await call.num_inputs.aio() == 1


async def test_a_function_calls_another(look: Look) -> None:
    assert await look("delegate").remote.aio(21) == 42


async def test_a_plain_function_is_served_under_a_name(modal_client: modal.Client) -> None:
    dumps = modal.Function.from_name("plain", "dumps", client=modal_client)
    assert await dumps.remote.aio([1, None]) == "[1, null]"


async def test_large_arguments_and_results_go_both_ways(look: Look, local_modal: Address) -> None:
    data = os.urandom(MEGABYTES)
    call = await look("echo").spawn.aio(data)
    assert await call.get.aio(timeout=PATIENCE) == data
    requests = local_modal.control.requests()
    assert (requests["BlobCreate"], requests["BlobGet"]) == (1, 1)


async def test_a_class_gets_its_parameters_and_enters_once(model: modal.Cls) -> None:
    tiny = model(name="tiny")
    name, text, size, entered, pid = await tiny.transcribe.remote.aio("a")
    assert (name, text, size, entered) == ("tiny", "a", 1, 1)
    assert await tiny.transcribe.remote.aio("b") == ("tiny", "b", 1, 1, pid)


async def test_other_parameters_mean_another_container(model: modal.Cls) -> None:
    call = await model(name="base", size=2).transcribe.spawn.aio("a")
    base = await call.get.aio(timeout=PATIENCE)
    tiny = await model(name="tiny").transcribe.remote.aio("a")
    assert base[:4] == ("base", "a", 2, 1)
    assert base[4] != tiny[4]


async def test_parameters_are_checked_by_the_client(model: modal.Cls) -> None:
    with pytest.raises(modal.exception.InvalidError, match="name"):
        await model().transcribe.spawn.aio("a")


async def test_several_get_the_same_result(
    look: Look, modal_client: modal.Client, tmp_path: Path
) -> None:
    call = await look("wait_for").spawn.aio(str(tmp_path / "go"))
    others = [modal.FunctionCall.from_id(call.object_id, modal_client) for _ in range(20)]
    gets = [asyncio.create_task(each.get.aio(timeout=PATIENCE)) for each in [call, *others]]
    (tmp_path / "go").touch()
    assert len(set(await asyncio.gather(*gets))) == 1


async def test_get_gives_up_after_its_timeout_and_can_be_called_again(
    look: Look, tmp_path: Path
) -> None:
    call = await look("wait_for").spawn.aio(str(tmp_path / "go"))
    for timeout in (0, 0.2):
        with pytest.raises(TimeoutError):
            await call.get.aio(timeout=timeout)
    (tmp_path / "go").touch()
    assert await call.get.aio(timeout=PATIENCE)


async def test_a_get_that_was_cancelled_here_can_be_called_again(
    look: Look, tmp_path: Path
) -> None:
    call = await look("wait_for").spawn.aio(str(tmp_path / "go"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await call.get.aio()
    (tmp_path / "go").touch()
    assert await call.get.aio(timeout=PATIENCE)


async def test_an_exception_keeps_its_class_and_traceback(look: Look) -> None:
    call = await look("fail").spawn.aio("out of cheese")
    with pytest.raises(Fault, match="out of cheese") as caught:
        await call.get.aio(timeout=PATIENCE)
    assert any("sample_app.py" in str(entry.path) for entry in caught.traceback)


async def test_an_exception_that_the_caller_lacks_is_an_execution_error(look: Look) -> None:
    call = await look("fail_with_what_the_caller_lacks").spawn.aio()
    with pytest.raises(modal.exception.ExecutionError, match="only_here"):
        await call.get.aio(timeout=PATIENCE)


async def test_a_functions_own_timeout_error_looks_like_the_polls(look: Look) -> None:
    call = await look("time_out_itself").spawn.aio()
    with pytest.raises(TimeoutError, match="the function's own") as caught:
        await call.get.aio(timeout=PATIENCE)
    assert caught.type is TimeoutError


async def test_a_failed_call_is_retried_as_its_function_says(
    look: Look, local_modal: Address, tmp_path: Path
) -> None:
    call = await look("fail_until").spawn.aio(str(tmp_path / "tries"))
    assert await call.get.aio(timeout=PATIENCE) == "at last"
    starts = local_modal.control.events("started", call_id=call.object_id)
    assert [start["attempt"] for start in starts] == [1, 2, 3]


async def test_cancel_interrupts_the_function(
    look: Look, local_modal: Address, tmp_path: Path
) -> None:
    started, cancelled = tmp_path / "started", tmp_path / "cancelled"
    call = await look("note_cancel").spawn.aio(str(started), str(cancelled))
    (start,) = local_modal.control.wait("started", call_id=call.object_id)
    wait_for_file(started)
    await call.cancel.aio()
    with pytest.raises(modal.exception.RemoteError):
        await call.get.aio(timeout=PATIENCE)
    local_modal.control.wait("output", call_id=call.object_id)
    assert cancelled.read_text() == "InputCancellation"
    os.kill(start["pid"], 0)  # the container lives on


async def test_cancel_kills_a_container_that_takes_no_notice(
    look: Look, local_modal: Address, tmp_path: Path
) -> None:
    call = await look("refuse_to_end").spawn.aio(str(tmp_path / "started"))
    (start,) = local_modal.control.wait("started", call_id=call.object_id)
    wait_for_file(tmp_path / "started")
    await call.cancel.aio()
    local_modal.control.wait("container ended", container=start["container"], killed="cancelled")
    with pytest.raises(ProcessLookupError):
        os.kill(start["pid"], 0)
    assert len(local_modal.control.events("started", call_id=call.object_id)) == 1


async def test_cancel_can_terminate_the_container_at_once(
    look: Look, local_modal: Address, tmp_path: Path
) -> None:
    call = await look("wait_for").spawn.aio(str(tmp_path / "never"))
    (start,) = local_modal.control.wait("started", call_id=call.object_id)
    await call.cancel.aio(terminate_containers=True)
    local_modal.control.wait("container ended", container=start["container"], killed="cancelled")
    with pytest.raises(modal.exception.RemoteError):
        await call.get.aio(timeout=PATIENCE)


async def test_a_call_that_was_cancelled_before_it_started_never_starts(
    look: Look, local_modal: Address
) -> None:
    local_modal.control.pause()
    cancelled, other = await look("double").spawn.aio(1), await look("double").spawn.aio(2)
    await cancelled.cancel.aio()
    local_modal.control.resume()
    assert await other.get.aio(timeout=PATIENCE) == 4
    assert not local_modal.control.events("started", call_id=cancelled.object_id)


async def test_a_cancel_after_the_end_changes_nothing(look: Look) -> None:
    call = await look("double").spawn.aio(1)
    assert await call.get.aio(timeout=PATIENCE) == 2
    await call.cancel.aio()
    assert await call.get.aio(timeout=PATIENCE) == 2


async def test_an_idle_container_is_scaled_down(look: Look, local_modal: Address) -> None:
    first = await look("pid").remote.aio()
    local_modal.control.wait("container ended", pid=first)
    assert await look("pid").remote.aio() != first


async def test_no_more_containers_start_than_the_function_allows(model: modal.Cls) -> None:
    calls = await asyncio.gather(*(model(name="few").transcribe.spawn.aio("") for _ in range(5)))
    pids = {(await call.get.aio(timeout=PATIENCE))[4] for call in calls}
    assert len(pids) == 1


async def test_the_log_says_what_ran(look: Look, local_modal: Address) -> None:
    call = await look("double").spawn.aio(value=8)
    await call.get.aio(timeout=PATIENCE)
    control = local_modal.control
    (spawned,) = control.events("spawned", call_id=call.object_id)
    (started,) = control.events("started", call_id=call.object_id)
    (output,) = control.events("output", call_id=call.object_id)
    (finished,) = control.events("finished", call_id=call.object_id)
    assert (spawned["function"], spawned["arguments"]) == ("double", "value=8")
    assert len(spawned["arguments_sha256"]) == 64
    assert (started["attempt"], started["pid"]) == (1, output["pid"])
    assert spawned["time"] <= started["time"] <= output["time"] <= finished["time"]
    assert finished["status"] == "GENERIC_STATUS_SUCCESS"
    assert "doubling 8" in control.output(started["container"])
