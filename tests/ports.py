"""Ports that nobody else is given while a test needs them."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """Yield a port on loopback where nothing listens but what the test starts there.

    A socket that is bound and does not listen keeps it meanwhile. Connections are refused; nobody
    who asks the kernel for any port gets this one; and whoever names it may listen there again and
    again, if with SO_REUSEADDR, as servers do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind((host, port))
        found: int = keeper.getsockname()[1]
        yield found
