"""grpclib's server, with a limit of our own on the requests that a connection may have open."""

from asyncio import BaseTransport
from collections.abc import Collection
from typing import Any

from grpclib.protocol import H2Protocol
from grpclib.server import Server
from h2.settings import SettingCodes


class _Protocol(H2Protocol):
    streams = 0

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        # h2 announces a limit of 100, and grpclib offers no way to say anything else.
        h2_connection = self.connection._connection  # noqa: SLF001
        h2_connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: self.streams})
        self.connection.flush()


class LimitedServer(Server):
    """Clients hold back what goes beyond ``streams``, until an open request is answered."""

    def __init__(self, services: Collection[Any], *, streams: int, **options: Any) -> None:
        super().__init__(services, **options)
        self._streams = streams

    def _protocol_factory(self) -> H2Protocol:
        protocol = super()._protocol_factory()
        limited = _Protocol(protocol.handler, protocol.config, protocol.h2_config)
        limited.streams = self._streams
        return limited
