"""A client in a process of its own, for tests that kill it or measure it."""

import asyncio
import resource
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import modal


def say(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201 -- the test reads it


async def spawn(function: str, *arguments: str) -> None:
    """Print the id, and wait for the result."""
    call = await modal.Function.from_name("sample", function).spawn.aio(*arguments)
    say(call.object_id)
    say(await call.get.aio())


async def fetch(call_id: str) -> None:
    say(await modal.FunctionCall.from_id(call_id).get.aio(timeout=60))


def resident() -> float:
    """Return the memory that this process occupies, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


async def many(count: str) -> None:
    """Hold calls in flight; print what that costs when told to, and the sum of their results."""
    function = modal.Function.from_name("sample", "echo")
    await function.hydrate.aio()
    before, started = resident(), time.monotonic()
    calls = await asyncio.gather(*(function.spawn.aio(n) for n in range(int(count))))
    spawned = time.monotonic() - started
    gets = [asyncio.create_task(call.get.aio()) for call in calls]
    await asyncio.to_thread(sys.stdin.readline)
    cpu = time.process_time()
    await asyncio.sleep(1)
    say(f"{before:.1f} {resident():.1f} {spawned:.2f} {time.process_time() - cpu:.2f}")
    say(sum(await asyncio.gather(*gets)))


COMMANDS: dict[str, Callable[..., Coroutine[Any, Any, None]]] = {
    "spawn": spawn,
    "fetch": fetch,
    "many": many,
}

if __name__ == "__main__":
    asyncio.run(COMMANDS[sys.argv[1]](*sys.argv[2:]))
