"""Whether a host can be found and reached: each step has a sentence of its own."""

import asyncio
import contextlib
import ipaddress
import socket
from dataclasses import dataclass

from jobs.doctor.checks import Finding, fail, in_thread

CONNECT_TIMEOUT = 5.0  # seconds, for all addresses of a host together


@dataclass(frozen=True, slots=True)
class Unreachable(Exception):
    """A host is not there; ``finding`` says in what way."""

    finding: Finding


async def reach(host: str, port: int, *, name: str) -> str:
    """Return the address at which somebody listens. Raises ``Unreachable``.

    ``name`` is the setting that the host is from.
    """
    refused = False
    for address in await _look_up(host, port, name):
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, writer = await asyncio.open_connection(address, port)
        except ConnectionRefusedError:
            refused = True
            continue
        except (TimeoutError, OSError):
            continue
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return address
    if refused:
        raise Unreachable(
            fail(
                f"nothing listens at {host}, port {port}: the connection is refused",
                f"See whether the server runs, and whether {name} has the right host and port.",
            )
        )
    raise Unreachable(
        fail(
            f"{host}, port {port}, does not answer within {CONNECT_TIMEOUT:g} s",
            "See whether a firewall or a network restriction keeps this machine out, and whether "
            "the host has an IPv4 address that this machine can use (Supabase's direct host has "
            "IPv6 only; its session pooler has IPv4).",
        )
    )


def is_near(host: str, address: str = "") -> bool:
    """Return whether what passes to a host stays on this machine, or on its containers' network.

    Only the latter have names of one word.
    """
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host or address).is_loopback
    return host.startswith("/") or "." not in host


async def _look_up(host: str, port: int, name: str) -> list[str]:
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            found = await in_thread(lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError, TimeoutError) as exc:
        raise Unreachable(
            fail(
                f"the name {host} is not found",
                f"See whether {name} is spelt right, whether the project is paused, and whether "
                "this machine has a name server that answers.",
            )
        ) from exc
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
