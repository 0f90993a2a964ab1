"""How the queue's benchmark speaks to its processes: in lines of JSON, the same for every system.

A process is told its role and options on its command line, answers on its standard output and ends
with its standard input, so never later than the benchmark. Times are of the clock that all
processes share, ``time.monotonic()``.

``version`` says ``{"versions": [[package, version], …]}``.

``produce`` answers each line that it is sent:

- ``{"url", "install": true}``: installs what its system needs in a database; ``{}``.
- ``{"url", "statements", "jobs"}``: enqueues so many times so many jobs; ``{"seconds"}``.
- ``{"url", "pickup": true}``: enqueues a job; ``{"committing", "committed"}``.
- ``{"close": true}``: closes its connection, which otherwise stays open; ``{}``.

``work {"url", "concurrency", "jobs", "stall", "behaviour"}`` is a worker. With ``jobs`` it says in
how many ``seconds`` it has drained so many, from its start to the commit of the last end. Without,
it says that it is ``ready``, and when each job ``started``. With ``stall`` it is to take workers
for dead that have been silent for so many seconds.
"""

import asyncio
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

POLL = 0.002  # seconds


@dataclass(frozen=True)
class Work:
    """What a worker is told."""

    url: str
    concurrency: int
    jobs: int = 0
    stall: float | None = None
    behaviour: str = "nothing"


class Producer(Protocol):
    """A connection that enqueues."""

    async def insert(self, number: int) -> None:
        """Enqueue so many jobs in one transaction, and in one statement if that can be."""

    async def commit(self) -> tuple[float, float]:
        """Enqueue one; return when its commit was sent and when that had returned."""

    async def close(self) -> None:
        """Close the connection."""


@dataclass(frozen=True)
class System:
    """What a process has to know of its system."""

    packages: Sequence[str]
    install: Callable[[str], Awaitable[None]]
    connect: Callable[[str], Awaitable[Producer]]
    work: Callable[[Work], Coroutine[Any, Any, None]]


def run(system: System, arguments: Sequence[str]) -> None:
    """Be the process that the arguments ask for."""
    logging.basicConfig(level=logging.ERROR)
    role, *options = arguments
    if role == "version":
        say({"versions": [(package, version(package)) for package in system.packages]})
    elif role == "produce":
        asyncio.run(produce(system))
    else:
        threading.Thread(target=end_with_stdin, daemon=True).start()
        asyncio.run(system.work(Work(**json.loads(options[0]))))


async def produce(system: System) -> None:
    """Answer the lines of standard input."""
    producer: Producer | None = None
    for line in sys.stdin:
        command = json.loads(line)
        if command.get("install"):
            await system.install(command["url"])
            say({})
        elif command.get("close"):
            if producer is not None:
                await producer.close()
            producer = None
            say({})
        else:
            producer = producer or await system.connect(command["url"])
            say(await enqueue(producer, command))


async def enqueue(producer: Producer, command: dict[str, Any]) -> dict[str, float]:
    """Enqueue what a line asks for, and return the answer."""
    if command.get("pickup"):
        committing, committed = await producer.commit()
        return {"committing": committing, "committed": committed}
    begin = time.monotonic()
    for _ in range(command["statements"]):
        await producer.insert(command["jobs"])
    return {"seconds": time.monotonic() - begin}


class Drained:
    """Waits for a number of starts, and then for the last commit."""

    def __init__(self, jobs: int) -> None:
        self._left = jobs
        self._all_started = asyncio.Event()

    def start(self) -> None:
        """Note a start."""
        self._left -= 1
        if not self._left:
            self._all_started.set()

    async def wait(self, begin: float, is_unfinished: Callable[[], Awaitable[bool]]) -> None:
        """Say how long it took."""
        await self._all_started.wait()
        while await is_unfinished():  # noqa: ASYNC110 - the commits are the database's
            await asyncio.sleep(POLL)
        say({"seconds": time.monotonic() - begin})


def say(message: dict[str, Any]) -> None:
    """Tell the benchmark."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def end_with_stdin() -> None:
    """Exit when whoever started this process closes the pipe, or is gone."""
    sys.stdin.buffer.read()
    os._exit(0)
