"""A Modal on loopback: the real protocol for the real client, with real processes behind it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Self

from aiohttp import web
from modal._utils.grpc_utils import custom_detail_codec

from tests.faults.proxy import Proxy
from tests.local_modal.blobs import LARGEST, Blobs
from tests.local_modal.calls import Calls
from tests.local_modal.containers import REPO, Launcher, deploy
from tests.local_modal.control import Control
from tests.local_modal.deployments import Deployments
from tests.local_modal.faults import Faults
from tests.local_modal.gateway import Gateway
from tests.local_modal.journal import Journal
from tests.local_modal.operations import Operator
from tests.local_modal.pools import Pools
from tests.local_modal.settings import Settings
from tests.local_modal.wire import LimitedServer

HOST = "127.0.0.1"
START = 60.0  # seconds, of which the deployment takes a few


class Address:
    """Where a server listens, for clients and for whoever controls it."""

    def __init__(self, url: str, control_url: str, token_id: str, token_secret: str) -> None:
        self.url = url
        self.control_url = control_url
        self.token_id = token_id
        self.token_secret = token_secret
        self.control = Control(control_url)

    def environment(self) -> dict[str, str]:
        """Return the variables by which a client process finds this server and no other."""
        return {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": self.token_id,
            "MODAL_TOKEN_SECRET": self.token_secret,
            "MODAL_CONFIG_PATH": os.devnull,
        }

    def to_json(self) -> str:
        return json.dumps(
            {
                "url": self.url,
                "control_url": self.control_url,
                "token_id": self.token_id,
                "token_secret": self.token_secret,
            }
        )


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Address]:
    """Serve on the running event loop. Its ``control`` is for other threads and processes."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="local-modal-")))
        listener = stack.enter_context(_listener())
        proxy = Proxy(listener.getsockname()[1])
        proxy.port = settings.port
        stack.enter_context(proxy)

        journal, deployments, blobs, faults = Journal(), Deployments(), Blobs(), Faults()
        launcher = Launcher(settings, deployments, folder)
        launcher.server_url = f"http://{HOST}:{proxy.target}"
        pools = Pools(settings, launcher, journal)
        calls = Calls(settings, deployments, blobs, pools, journal)
        gateway = Gateway(settings, deployments, calls, pools, blobs, faults, proxy.cut)
        operator = Operator(
            calls=calls,
            pools=pools,
            journal=journal,
            faults=faults,
            launcher=launcher,
            deployments=deployments,
            proxy=proxy,
            requests=gateway.requests,
        )
        blobs.url = await stack.enter_async_context(_http([*blobs.routes(), *operator.routes()]))
        await stack.enter_async_context(_grpc(gateway, listener, settings.streams))
        stack.push_async_callback(pools.close)
        await deploy(settings, launcher.server_url)
        gateway.requests.counts.clear()
        yield Address(
            f"http://{HOST}:{proxy.port}", blobs.url, settings.token_id, settings.token_secret
        )


def _listener() -> socket.socket:
    """Name TCP, or asyncio leaves Nagle's algorithm on: 40 ms for each message."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind((HOST, 0))
    return listener


@contextlib.asynccontextmanager
async def _http(routes: list[web.RouteDef]) -> AsyncIterator[str]:
    app = web.Application(client_max_size=LARGEST)
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0)
    await runner.setup()
    try:
        listener = _listener()
        await web.SockSite(runner, listener).start()
        yield f"http://{HOST}:{listener.getsockname()[1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _grpc(gateway: Gateway, listener: socket.socket, streams: int) -> AsyncIterator[None]:
    server = LimitedServer([gateway], streams=streams, status_details_codec=custom_detail_codec)
    await server.start(sock=listener)
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


@contextlib.contextmanager
def in_thread(settings: Settings) -> Iterator[Address]:
    """Serve in this process, on a thread and an event loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="local-modal", daemon=True)
    thread.start()
    server = serving(settings)
    try:
        address = asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(START)
        try:
            yield address
        finally:
            exiting = server.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(exiting, loop).result(START)
    finally:
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result(START)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(START)
        loop.close()


class ServerProcess(Address):
    """A server in a process of its own, which does not mind what happens to its clients."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("The local Modal did not start; its stderr says why")
        super().__init__(**json.loads(line))

    @property
    def pid(self) -> int:
        return self.process.pid

    @classmethod
    @contextlib.contextmanager
    def started(cls, settings: Settings) -> Iterator[Self]:
        command = [sys.executable, "-m", "tests.local_modal", "--settings", settings.to_json()]
        with subprocess.Popen(
            command, cwd=REPO, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as process:
            try:
                yield cls(process)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(START)
