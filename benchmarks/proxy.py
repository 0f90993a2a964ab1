"""A TCP proxy that delays and counts: ``python -m benchmarks.proxy PORT SECONDS``.

It prints the port that it listens on. Whatever comes arrives SECONDS later, in each direction; any
amount may be on its way meanwhile, so it adds round-trip time but does not limit throughput. For
each line on its standard input it prints how many statements it has passed on; it ends with it.
With ``--uncounted`` it passes on any protocol, otherwise that of Postgres.
"""

import asyncio
import selectors
import sys
from collections import deque
from collections.abc import Callable

import click

STARTUP_HEADER, HEADER = 4, 5  # bytes; only the first message has no type before its length
STATEMENTS = b"QE"  # Query and Execute


class StatementCounter:
    """Counts the statements in what one client sends. TLS must be off."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._header = STARTUP_HEADER
        self.count = 0

    def feed(self, data: bytes) -> None:
        """Take what the client sent next."""
        self._buffer += data
        while len(self._buffer) >= self._header:
            typed = self._header - STARTUP_HEADER
            end = typed + int.from_bytes(self._buffer[typed : self._header])
            if len(self._buffer) < end:
                return
            self.count += self._header == HEADER and self._buffer[0] in STATEMENTS
            del self._buffer[:end]
            self._header = HEADER


class DelayedWriter:
    """Writes what it is given in order, each piece ``delay`` seconds later; ``b""`` closes."""

    def __init__(self, writer: asyncio.StreamWriter, delay: float) -> None:
        self._writer = writer
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, bytes]] = deque()

    def write(self, data: bytes) -> None:
        """Send ``data`` on its way."""
        if not self._delay:
            self._pass_on(data)
            return
        self._queue.append((self._loop.time() + self._delay, data))
        if len(self._queue) == 1:
            self._loop.call_at(self._queue[0][0], self._flush)

    def _flush(self) -> None:
        while self._queue and self._queue[0][0] <= self._loop.time():
            self._pass_on(self._queue.popleft()[1])
        if self._queue:
            self._loop.call_at(self._queue[0][0], self._flush)

    def _pass_on(self, data: bytes) -> None:
        if data:
            self._writer.write(data)
        else:
            self._writer.close()


async def _pump(
    reader: asyncio.StreamReader, writer: DelayedWriter, feed: Callable[[bytes], None] | None
) -> None:
    data = b"-"
    while data:
        try:
            data = await reader.read(1 << 16)
        except OSError:
            data = b""
        if feed is not None:
            feed(data)
        writer.write(data)


async def _serve(port: int, delay: float, *, counted: bool) -> None:
    counters: list[StatementCounter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        counter = StatementCounter()
        counters.append(counter)
        await asyncio.gather(
            _pump(reader, DelayedWriter(server_writer, delay), counter.feed if counted else None),
            _pump(server_reader, DelayedWriter(writer, delay), None),
        )

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    click.echo(server.sockets[0].getsockname()[1])
    questions = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(questions), sys.stdin
    )
    while await questions.readline():
        click.echo(sum(counter.count for counter in counters))


@click.command()
@click.argument("port", type=int)
@click.argument("delay", type=float)
@click.option("--counted/--uncounted", default=True)
def main(port: int, delay: float, *, counted: bool) -> None:
    """Pass connections on to PORT on loopback, each way DELAY seconds late."""
    # The default selector rounds up to whole milliseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(_serve(port, delay, counted=counted))


if __name__ == "__main__":
    main()
