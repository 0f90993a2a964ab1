"""python -m tests.local_modal --app modal_functions.app:app: one line of JSON when it is ready."""

import argparse
import asyncio
import contextlib
import signal
import sys
from dataclasses import replace

from tests.local_modal.server import serving
from tests.local_modal.settings import Settings


def arguments() -> Settings:
    parser = argparse.ArgumentParser(description="Serve Modal's protocol on loopback.")
    parser.add_argument("--app", action="append", default=[], metavar="MODULE:APP")
    parser.add_argument(
        "--function", action="append", default=[], metavar="APP/NAME=MODULE:FUNCTION"
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--settings", help="JSON with all settings", default=Settings().to_json())
    given = parser.parse_args()
    settings = Settings.from_json(given.settings)
    functions = dict(function.split("=", 1) for function in given.function)
    return replace(
        settings,
        apps=(*settings.apps, *given.app),
        functions={**settings.functions, **functions},
        port=given.port or settings.port,
    )


async def main() -> None:
    stop = asyncio.Event()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, stop.set)
    async with serving(arguments()) as address:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.write(address.to_json() + "\n")
            sys.stdout.flush()
        await stop.wait()


if __name__ == "__main__":
    asyncio.run(main())
