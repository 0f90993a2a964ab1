"""Who waits for whom while transcripts are set."""

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from uuid import uuid4

import pytest

from jobs.errors import RateLimited
from web.rendering import MOST, Renderer

pytestmark = pytest.mark.anyio


@pytest.fixture
async def renderer() -> AsyncIterator[Renderer]:
    async with Renderer() as renderer:
        yield renderer


async def test_a_user_leaves_a_thread_to_the_others(renderer: Renderer) -> None:
    user, other = uuid4(), uuid4()
    done = threading.Event()
    asked = [asyncio.create_task(renderer.run(user, done.wait)) for _ in range(MOST)]
    try:
        assert await renderer.run(other, lambda: "text") == "text"
        with pytest.raises(RateLimited, match=f"You wait for {MOST} transcripts already"):
            await renderer.run(user, lambda: "text")
    finally:
        done.set()
    assert await asyncio.gather(*asked) == [True] * MOST
    assert await renderer.run(user, lambda: "text") == "text"


async def test_a_user_is_answered_in_turn_also_after_what_failed(renderer: Renderer) -> None:
    user, order = uuid4(), list[int]()
    asked = [renderer.run(user, partial(order.append, n)) for n in range(5)]
    failed = asyncio.create_task(renderer.run(user, lambda: 1 // 0))
    await asyncio.gather(*asked)
    with pytest.raises(ZeroDivisionError):
        await failed
    assert order == [0, 1, 2, 3, 4]
