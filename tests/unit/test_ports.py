"""What a reserved port is good for: nothing listens there but what the test starts."""

import errno
import socket

import pytest

from tests import ports


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_reserved_port_refuses_until_somebody_listens_and_again_afterwards(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ports.reserved(host) as port:
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, port))
            with (
                socket.create_server((host, port), family=family) as server,
                socket.create_connection((host, port)),
            ):
                server.accept()[0].close()
        with ports.reserved(host) as another:
            assert another != port


def test_a_reserved_port_is_nobody_elses() -> None:
    with ports.reserved() as port, socket.socket() as other:
        with pytest.raises(OSError, match="in use") as refused:
            other.bind(("127.0.0.1", port))
        assert refused.value.errno == errno.EADDRINUSE
