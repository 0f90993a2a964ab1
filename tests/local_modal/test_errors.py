"""Each error of a real server, and how the unpatched client shows it."""

import asyncio
from collections.abc import Callable
from typing import Any

import modal
import pytest
from grpclib.exceptions import StreamTerminatedError

from tests.local_modal.sample_app import Fault
from tests.local_modal.server import Address

pytestmark = pytest.mark.anyio

PATIENCE = 60.0
ATTEMPTS = 4  # of the client, for each request

Look = Callable[[str], "modal.Function[Any, Any, Any]"]
Call = modal.FunctionCall[Any]


@pytest.fixture
def look(modal_client: modal.Client) -> Look:
    def look_up(name: str) -> "modal.Function[Any, Any, Any]":
        return modal.Function.from_name("sample", name, client=modal_client)

    return look_up


@pytest.fixture
async def call(look: Look) -> Call:
    return await look("double").spawn.aio(21)


@pytest.mark.parametrize(
    ("status", "error", "attempts"),
    [
        ("UNAVAILABLE", modal.exception.ServiceError, ATTEMPTS),
        ("DEADLINE_EXCEEDED", modal.exception.ServiceError, ATTEMPTS),
        ("INTERNAL", modal.exception.InternalError, ATTEMPTS),
        ("RESOURCE_EXHAUSTED", modal.exception.ResourceExhaustedError, 1),
        ("UNAUTHENTICATED", modal.exception.AuthError, 1),
        ("PERMISSION_DENIED", modal.exception.PermissionDeniedError, 1),
        ("INVALID_ARGUMENT", modal.exception.InvalidError, 1),
        ("FAILED_PRECONDITION", modal.exception.ConflictError, 1),
    ],
)
async def test_a_refused_get(
    local_modal: Address, call: Call, status: str, error: type[Exception], attempts: int
) -> None:
    """And the same id can be asked for again."""
    local_modal.control.fail("FunctionGetOutputs", status, times=attempts)
    with pytest.raises(error) as caught:
        await call.get.aio(timeout=PATIENCE)
    assert caught.type is error
    assert local_modal.control.requests()["FunctionGetOutputs"] == attempts
    assert await call.get.aio(timeout=PATIENCE) == 42


async def test_fewer_failures_than_the_client_has_attempts_do_not_show(
    local_modal: Address, call: Call
) -> None:
    local_modal.control.fail("FunctionGetOutputs", "UNAVAILABLE", times=ATTEMPTS - 1)
    assert await call.get.aio(timeout=PATIENCE) == 42


async def test_the_client_waits_as_long_as_the_server_says(
    local_modal: Address, call: Call
) -> None:
    local_modal.control.fail("FunctionGetOutputs", "RESOURCE_EXHAUSTED", retry_after=0.2)
    assert await call.get.aio(timeout=PATIENCE) == 42


async def test_the_connection_is_lost_again_and_again(local_modal: Address, call: Call) -> None:
    local_modal.control.fail("FunctionGetOutputs", "CUT", times=ATTEMPTS)
    with pytest.raises((modal.exception.ConnectionError, StreamTerminatedError)):
        await call.get.aio(timeout=PATIENCE)
    assert await call.get.aio(timeout=PATIENCE) == 42


async def test_nobody_listens_any_more(local_modal: Address, call: Call) -> None:
    local_modal.control.refuse()
    with pytest.raises((modal.exception.ConnectionError, StreamTerminatedError)):
        await call.get.aio(timeout=PATIENCE)
    local_modal.control.heal()
    assert await call.get.aio(timeout=PATIENCE) == 42


async def test_one_lost_connection_does_not_show(local_modal: Address, look: Look) -> None:
    local_modal.control.pause()
    calls = await asyncio.gather(*(look("double").spawn.aio(n) for n in range(20)))
    gets = [asyncio.create_task(call.get.aio(timeout=PATIENCE)) for call in calls]
    await asyncio.to_thread(local_modal.control.wait_for_requests, "FunctionGetOutputs", 20)
    local_modal.control.cut()
    local_modal.control.resume()
    assert await asyncio.gather(*gets) == [2 * n for n in range(20)]


async def test_in_a_black_hole_only_a_timeout_of_ones_own_helps(
    local_modal: Address, call: Call
) -> None:
    local_modal.control.black_hole()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await call.get.aio(timeout=0)
    local_modal.control.heal()
    local_modal.control.cut()  # or the client would find out by its keepalive, 40 s later
    assert await call.get.aio(timeout=PATIENCE) == 42


async def test_what_was_held_up_arrives_later(local_modal: Address, call: Call) -> None:
    local_modal.control.hold(seconds=0.5)
    assert await call.get.aio(timeout=PATIENCE) == 42


async def test_a_slow_answer_only_takes_time(local_modal: Address, call: Call) -> None:
    local_modal.control.delay("FunctionGetOutputs", 0.3)
    assert await call.get.aio(timeout=PATIENCE) == 42


@pytest.mark.parametrize(
    ("status", "error"),
    [
        ("INTERNAL_FAILURE", modal.exception.InternalFailure),
        ("TIMEOUT", modal.exception.FunctionTimeoutError),
        ("INIT_FAILURE", modal.exception.RemoteError),
        ("TERMINATED", modal.exception.RemoteError),
        ("FAILURE", modal.exception.RemoteError),
    ],
)
async def test_a_call_that_modal_ends(
    local_modal: Address, look: Look, status: str, error: type[Exception]
) -> None:
    local_modal.control.end_next("double", status, exception="by the operator")
    call = await look("double").spawn.aio(1)
    with pytest.raises(error, match="by the operator") as caught:
        await call.get.aio(timeout=PATIENCE)
    assert caught.type is error
    assert await look("double").remote.aio(1) == 2
    assert not local_modal.control.events("started", call_id=call.object_id)


async def test_a_running_call_that_modal_ends(local_modal: Address, look: Look) -> None:
    call = await look("wait_for").spawn.aio("/nonexistent")
    (start,) = local_modal.control.wait("started", call_id=call.object_id)
    local_modal.control.end(call.object_id, "INTERNAL_FAILURE")
    with pytest.raises(modal.exception.InternalFailure):
        await call.get.aio(timeout=PATIENCE)
    local_modal.control.wait("container ended", container=start["container"])


async def test_a_function_that_takes_too_long(local_modal: Address, look: Look) -> None:
    call = await look("sleep").spawn.aio(60)
    with pytest.raises(modal.exception.FunctionTimeoutError):
        await call.get.aio(timeout=PATIENCE)
    local_modal.control.wait("container ended", killed="timeout")


async def test_with_options_sets_another_timeout(look: Look) -> None:
    """The function's own is 1 s."""
    patient = look("sleep").with_options(timeout=20)
    assert await patient.remote.aio(1.2) is None


async def test_an_expired_result(local_modal: Address, call: Call) -> None:
    await call.get.aio(timeout=PATIENCE)
    local_modal.control.expire(call.object_id)
    with pytest.raises(modal.exception.OutputExpiredError):
        await call.get.aio(timeout=0)


async def test_a_result_that_remote_has_fetched_is_gone(
    local_modal: Address, look: Look, modal_client: modal.Client
) -> None:
    await look("double").remote.aio(1)
    (spawned,) = local_modal.control.events("spawned")
    call: Call = modal.FunctionCall.from_id(spawned["call_id"], modal_client)
    with pytest.raises(modal.exception.OutputExpiredError):
        await call.get.aio(timeout=0)


async def test_a_lost_call(local_modal: Address, call: Call) -> None:
    local_modal.control.lose(call.object_id)
    with pytest.raises(modal.exception.NotFoundError):
        await call.get.aio(timeout=PATIENCE)


async def test_a_call_that_is_lost_while_somebody_waits(local_modal: Address, look: Look) -> None:
    call = await look("wait_for").spawn.aio("/nonexistent")
    get = asyncio.create_task(call.get.aio(timeout=PATIENCE))
    await asyncio.to_thread(local_modal.control.wait_for_requests, "FunctionGetOutputs", 1)
    local_modal.control.lose(call.object_id)
    with pytest.raises(modal.exception.NotFoundError):
        await get


async def test_a_call_that_never_was(modal_client: modal.Client) -> None:
    call: Call = modal.FunctionCall.from_id("fc-none", modal_client)
    for ask in (call.get.aio, call.cancel.aio):
        with pytest.raises(modal.exception.NotFoundError):
            await ask()


@pytest.mark.parametrize(("app", "name"), [("sample", "nothing"), ("nothing", "double")])
async def test_what_is_not_deployed(modal_client: modal.Client, app: str, name: str) -> None:
    function = modal.Function.from_name(app, name, client=modal_client)
    with pytest.raises(modal.exception.NotFoundError, match=name):
        await function.spawn.aio(1)
    model = modal.Cls.from_name(app, name, client=modal_client)
    with pytest.raises(modal.exception.NotFoundError, match=name):
        await model().transcribe.spawn.aio()


async def test_a_method_that_a_class_does_not_have(modal_client: modal.Client) -> None:
    model = modal.Cls.from_name("sample", "Model", client=modal_client)
    with pytest.raises(modal.exception.NotFoundError, match="dream"):
        await model(name="tiny").dream.spawn.aio()


async def test_a_class_that_is_taken_for_a_function(look: Look) -> None:
    with pytest.raises(modal.exception.NotFoundError, match=r"is a modal\.Cls"):
        await look("Model").spawn.aio()


async def test_a_wrong_token(local_modal: Address) -> None:
    client = await modal.Client.from_credentials.aio(local_modal.token_id, "as-wrong")
    async with client:
        with pytest.raises(modal.exception.AuthError):
            await client.hello.aio()  # type: ignore[no-untyped-call]
        function = modal.Function.from_name("sample", "double", client=client)
        with pytest.raises(modal.exception.AuthError):
            await function.spawn.aio(1)


async def test_the_right_token_says_hello(modal_client: modal.Client) -> None:
    await modal_client.hello.aio()  # type: ignore[no-untyped-call]


async def test_a_container_whose_start_raises_fails_the_call_with_that(
    local_modal: Address, modal_client: modal.Client
) -> None:
    broken = modal.Cls.from_name("sample", "Broken", client=modal_client)
    call = await broken().transcribe.spawn.aio()
    with pytest.raises(Fault, match="no weights"):
        await call.get.aio(timeout=PATIENCE)
    assert not local_modal.control.events("started")


async def test_a_container_that_dies_at_its_start_is_a_remote_error(
    modal_client: modal.Client,
) -> None:
    stillborn = modal.Cls.from_name("sample", "Stillborn", client=modal_client)
    call = await stillborn().transcribe.spawn.aio()
    with pytest.raises(modal.exception.RemoteError):
        await call.get.aio(timeout=PATIENCE)
