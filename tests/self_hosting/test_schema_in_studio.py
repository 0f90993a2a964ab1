"""Studio's schema service, `postgres-meta`, on a migrated database, as with Compose."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.conftest import REPO

NODE = shutil.which("node")
# Beside the Supabase CLI; fetching it takes too long for CI:
# npm install --prefix .pgscribe/tools @supabase/postgres-meta@0.99.0
TOOLS = Path(shutil.which("supabase") or "absent/absent").parents[1]
SERVER = TOOLS / "@supabase" / "postgres-meta" / "dist" / "server" / "server.js"

pytestmark = pytest.mark.skipif(
    NODE is None or not SERVER.exists(), reason="needs node and npm: @supabase/postgres-meta"
)


def two_free_ports() -> int:
    """Return a free port after which the next one is free: the server takes that, too."""
    while True:
        with closing(socket.create_server(("127.0.0.1", 0))) as first:
            port: int = first.getsockname()[1]
            with suppress(OSError, OverflowError):
                socket.create_server(("127.0.0.1", port + 1)).close()
                return port


@pytest.fixture
def meta(database: str, tmp_path: Path) -> Iterator[httpx2.Client]:
    """The server, as `postgres`, which is no superuser."""
    url, port = urlsplit(database), two_free_ports()
    environment = {
        "PG_META_HOST": "127.0.0.1",
        "PG_META_PORT": str(port),
        "PG_META_DB_HOST": str(url.hostname),
        "PG_META_DB_PORT": str(url.port),
        "PG_META_DB_NAME": url.path[1:],
        "PG_META_DB_USER": str(url.username),
        "PG_META_DB_PASSWORD": str(url.password),
        "CRYPTO_KEY": "a key of thirty-two characters..",
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(NODE), str(SERVER)], env=os.environ | environment, stdout=log, stderr=log
        )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                assert process.poll() is None, (tmp_path / "log").read_text()
                with suppress(httpx2.TransportError):
                    http.get("/health").raise_for_status()
                    break
                time.sleep(0.05)
            yield http
    finally:
        process.kill()
        process.wait()


def test_studio_shows_tables_with_their_comments(meta: httpx2.Client) -> None:
    tested = json.loads((SERVER.parents[2] / "package.json").read_text())["version"]
    image = f"image: supabase/postgres-meta:v{tested}\n"
    assert image in (REPO / "docker-compose.yml").read_text(encoding="utf-8")

    def ask(path: str) -> Any:
        answer = meta.get(path, params={"included_schemas": "public"})
        assert answer.status_code == 200, answer.text
        return answer.json()

    tables = {table["name"]: table for table in ask("/tables")}
    assert {"processing_jobs", "processing_job_attempts", "webhook_deliveries"} <= set(tables)
    assert all(table["rls_enabled"] and table["comment"] for table in tables.values())
    columns = {column["name"]: column for column in tables["processing_jobs"]["columns"]}
    assert columns["status"]["comment"]
    assert not [column for column in ask("/columns") if not column["comment"]]
    functions = {function["name"]: function for function in ask("/functions")}
    assert "uuid" in functions["cancel_processing_job"]["argument_types"]
    assert {policy["table"] for policy in ask("/policies")} >= {"processing_jobs"}
    # The SQL editor's way in.
    query = {"query": "select count(*)::int as jobs from public.processing_jobs"}
    assert meta.post("/query", json=query).json() == [{"jobs": 0}]
    refused = meta.post("/query", json={"query": "alter system set fsync = off"})
    assert refused.status_code == 400
    assert "permission denied" in refused.text
