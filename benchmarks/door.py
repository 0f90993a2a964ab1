"""Rows by all ways into the queue, while those who insert are killed.

Part of the section ``promises``.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.by_hand import Agreement
from benchmarks.door_client import ROLES
from benchmarks.figures import Measurement
from benchmarks.postgres import OWNERS, Postgres
from benchmarks.web_process import WebProcess, token, web_process
from db import named_queries

QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))
WAYS = {
    "one": "POST /process",
    "batch": "POST /process/batch",
    "postgres": "SQL, postgres",
    "authenticated": "SQL, authenticated",
    "service_role": "SQL, service_role",
}
SEED = 1
LONGEST = 0.4  # seconds between two kills
PATIENCE, LOOK = 60.0, 0.02  # seconds

METHOD = """\
**One door.** A client process for each of five ways inserts as fast as it can: `POST /process` and
`POST /process/batch` to `pgscribe web`, and SQL as `postgres`, as `service_role` and as
`authenticated` under row level security, in transactions of one to three statements of 1 to 20
rows. {undone:.0%} of the transactions are rolled back, or refused for one of their rows. For
{seconds:g} s one client after the other gets `kill -9` at a random moment, and another takes its
place; so does the web server, {web_kills} times. Then rows and queue jobs are compared. *Answered
and gone*: rows whose commit a client had been told of."""


@dataclass(frozen=True)
class Sizes:
    """For how long to insert, and how often the web server is killed meanwhile."""

    seconds: float = 12.0
    web_kills: int = 2


QUICK = Sizes(3.0, 1)


class Door:
    """The clients and the web server, and what clients were told."""

    def __init__(self, stack: ExitStack, url: str, folder: Path) -> None:
        self._stack = stack
        self._url = url
        self._folder = folder
        self._told = {way: folder / f"told by {way}" for way in WAYS}
        self._web_stack = stack.enter_context(ExitStack())
        self._web = self._start_web()
        self._clients: dict[str, subprocess.Popen[bytes]] = {}
        self._number = 0
        self.kills = 0

    def _start_web(self) -> WebProcess:
        return self._web_stack.enter_context(web_process(self._url, self._folder))

    def start_missing(self) -> None:
        """Start clients for the ways that have none."""
        for way in WAYS:
            client = self._clients.get(way)
            if client is None or client.poll() is not None:
                self._clients[way] = self._start(way)

    def _start(self, way: str) -> "subprocess.Popen[bytes]":
        self._number += 1
        by_rest = f"http://127.0.0.1:{self._web.port}"
        with self._told[way].open("ab") as told:
            client = subprocess.Popen(
                [
                    *(sys.executable, "-m", "benchmarks.door_client", way),
                    *(self._url if way in ROLES else by_rest, str(OWNERS[1]), str(self._number)),
                ],
                env=os.environ | {"DOOR_TOKEN": token(OWNERS[1])},
                stdout=told,
                stderr=subprocess.DEVNULL,
            )
        self._stack.callback(client.wait)
        self._stack.callback(client.kill)
        return client

    def kill(self, way: str) -> None:
        """Kill the client of a way."""
        self._clients[way].kill()
        self._clients[way].wait()
        self.kills += 1

    def kill_web(self) -> None:
        """Kill the web server, and start another one."""
        os.kill(self._web.pid, 9)
        self._web_stack.close()
        self.kills += 1
        self._web = self._start_web()

    def close(self) -> list[list[str]]:
        """Kill all; return what clients were told of each transaction."""
        for way in self._clients:
            self.kill(way)
        self._web_stack.close()
        return [
            line.split() for told in self._told.values() for line in told.read_text().splitlines()
        ]

    def wait_for_all(self) -> None:
        """Return when clients of all ways have been told of a transaction from now on."""
        before = {way: told.stat().st_size for way, told in self._told.items()}
        deadline = time.monotonic() + PATIENCE
        while any(told.stat().st_size == before[way] for way, told in self._told.items()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Not within {PATIENCE:g} s: a client of each way inserts")
            time.sleep(LOOK)
            self.start_missing()


def provoke(door: Door, sizes: Sizes) -> list[list[str]]:
    """Insert and kill for a while, not counting what it takes until all ways are open."""
    chance = random.Random(SEED)  # noqa: S311 - no secret
    parts = sizes.web_kills + 1
    for part in range(parts):
        if part:
            door.kill_web()
        door.start_missing()
        door.wait_for_all()
        end = time.monotonic() + sizes.seconds / parts
        while time.monotonic() < end:
            door.start_missing()
            time.sleep(chance.uniform(0, LONGEST))
            door.kill(chance.choice(list(WAYS)))
    return door.close()


def measure(
    postgres: Postgres, folder: Path, agreement: Agreement, sizes: Sizes
) -> Iterator[Measurement]:
    """Yield the lines."""
    with ExitStack() as stack:
        name = stack.enter_context(postgres.fresh())
        conn = stack.enter_context(postgres.connect(name))
        door = Door(stack, postgres.url(name), folder)
        told = provoke(door, sizes)
        agreement.look(conn)
        yield from compare(conn, door.kills, told)


def compare(
    conn: psycopg.Connection[Any], kills: int, told: list[list[str]]
) -> Iterator[Measurement]:
    """Yield the lines. ``told``: the rows of each transaction, or ``undone``."""

    def line(name: str, what: str, unit: str, figures: Mapping[str, float]) -> Measurement:
        higher = name in {"rows", "undone", "kills"}
        return Measurement(
            f"promises-door-{name}",
            what,
            unit,
            "higher" if higher else "lower",
            {system: [figure] for system, figure in figures.items()},
            headline=name == "without-job",
        )

    def count(query: str, values: Mapping[str, object] | None = None) -> dict[str, int]:
        return {"pgscribe": conn.execute(QUERIES[query], values).fetchall()[0][0]}

    rows: dict[str, tuple[int, int]] = {
        way: (number, lacking) for way, number, lacking in conn.execute(QUERIES["rows"])
    }
    answered = [ids for ids in told if ids != ["undone"]]
    yield line(
        "rows",
        "Rows committed",
        "rows",
        {what: rows.get(way, (0, 0))[0] for way, what in WAYS.items()},
    )
    yield line(
        "without-job",
        "Rows without a queue job",
        "rows",
        {what: rows.get(way, (0, 0))[1] for way, what in WAYS.items()},
    )
    yield line("kills", "Clients and web servers killed (kill -9)", "kills", {"pgscribe": kills})
    undone = {"pgscribe": len(told) - len(answered)}
    yield line("undone", "Transactions rolled back or refused", "transactions", undone)
    yield line("without-row", "Queue jobs without a row", "queue jobs", count("without_row"))
    ids = {"ids": [one for some in answered for one in some]}
    yield line("gone", "Rows answered and gone", "rows", count("gone", ids))
