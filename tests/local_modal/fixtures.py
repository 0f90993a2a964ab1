"""For a conftest to import: a local Modal, and clients of it.

Override ``local_modal_settings`` to serve an app. The server and its warm containers last for the
session; each test finds it without calls, faults and events.
"""

from collections.abc import AsyncIterator, Iterator

import modal
import pytest

from tests.local_modal.server import Address, in_thread
from tests.local_modal.settings import Settings


@pytest.fixture(scope="session")
def local_modal_settings() -> Settings:
    return Settings()


@pytest.fixture(scope="session")
def local_modal_server(local_modal_settings: Settings) -> Iterator[Address]:
    with in_thread(local_modal_settings) as server:
        yield server


@pytest.fixture
def local_modal(local_modal_server: Address, monkeypatch: pytest.MonkeyPatch) -> Iterator[Address]:
    """A server that this process's own environment names, too."""
    for name, value in local_modal_server.environment().items():
        monkeypatch.setenv(name, value)
    yield local_modal_server
    local_modal_server.control.reset()


@pytest.fixture
async def modal_client(local_modal: Address) -> AsyncIterator[modal.Client]:
    """A client of the test's own, for ``client=``; the one from the environment is for ever."""
    client = await modal.Client.from_credentials.aio(local_modal.token_id, local_modal.token_secret)
    async with client:
        yield client
