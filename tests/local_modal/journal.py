"""The execution log: what was spawned, started, ended, cancelled, and on which container."""

import asyncio
import hashlib
import io
import pickle
import time
from typing import Any

import cbor2
from modal_proto import api_pb2 as pb

Event = dict[str, Any]

LONGEST_ARGUMENTS = 1000  # characters


class Journal:
    """Events in the order in which they happened. Read it as the signal that a test waits for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()

    def add(self, event: str, **fields: object) -> None:
        self.events.append({"event": event, "time": time.time(), **fields})
        self._news.set()
        self._news = asyncio.Event()

    def matching(self, **fields: object) -> list[Event]:
        return [event for event in self.events if fields.items() <= event.items()]

    async def wait(self, count: int, **fields: object) -> list[Event]:
        """Return the matching events once there are ``count``."""
        while len(found := self.matching(**fields)) < count:
            await self._news.wait()
        return found


class _PlainUnpickler(pickle.Unpickler):
    """Reads what is made of plain values alone, so that the server imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain")


def describe_arguments(serialized: bytes, data_format: int) -> dict[str, str | None]:
    """Return a digest of the arguments, and their text where they are plain values."""
    return {
        "arguments_sha256": hashlib.sha256(serialized).hexdigest(),
        "arguments": _text(serialized, data_format),
    }


def _text(serialized: bytes, data_format: int) -> str | None:
    try:
        if data_format == pb.DATA_FORMAT_CBOR:
            args, kwargs = cbor2.loads(serialized)
        else:
            args, kwargs = _PlainUnpickler(io.BytesIO(serialized)).load()
    except Exception:  # noqa: BLE001 -- unpickling may raise whatever it likes
        return None
    texts = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
    return ", ".join(texts)[:LONGEST_ARGUMENTS]
