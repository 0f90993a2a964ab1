"""`kill -9` of the web server while it inserts jobs."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import httpx2
import psycopg
import pytest

from jobs.settings import Settings
from tests import ports
from tests.faults.fleet import Fleet, Jobs, until
from tests.faults.invariants import ALWAYS, violations
from web.auth import issue_token

CLIENTS = 4
ROUNDS = 3


@contextmanager
def web_server(settings: Settings, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {
        "PGSCRIBE_DATABASE_URL": settings.database_url.get_secret_value(),
        "PGSCRIBE_JWT_SECRET": settings.require_jwt_secret(),
        "PGSCRIBE_STORAGE_DIR": str(settings.storage_dir),
        "PGSCRIBE_RATE_LIMIT": "0",
    }
    with (folder / "web.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "web", "--port", str(port), "--stop-with-stdin"],
            env=environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def port() -> Iterator[int]:
    with ports.reserved() as port:
        yield port


def test_a_killed_web_server_leaves_whole_jobs_or_none(
    settings: Settings,
    port: int,
    fleet: Fleet,
    jobs: Jobs,
    user: UUID,
    tmp_path: Path,
    settled: Callable[[], None],
) -> None:
    url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {issue_token(settings, user, lifetime=600)}"}
    accepted: list[UUID] = []
    over = threading.Event()

    def insist() -> None:
        while not over.is_set():
            with httpx2.Client(base_url=url, headers=headers) as client:
                with contextlib.suppress(httpx2.TransportError):
                    submit(client)
                over.wait(0.02)

    def submit(client: httpx2.Client) -> None:
        while not over.is_set():
            response = client.post("/process", json={"filePath": f"{user}/sleep"})
            assert response.status_code == 202, response.text
            accepted.append(UUID(response.json()["jobId"]))

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(insist) for _ in range(CLIENTS)]
        try:
            for _ in range(ROUNDS):
                before = len(accepted)
                with web_server(settings, port, tmp_path) as process:
                    until(lambda: len(accepted) > before + 50, "jobs are accepted")  # noqa: B023
                    process.kill()
        finally:
            over.set()
        for client in clients:
            client.result()

    with psycopg.connect(fleet.url, autocommit=True) as conn:
        assert violations(conn, ALWAYS) == []
        rows = conn.execute("select id from processing_jobs").fetchall()
    assert set(accepted) <= {row[0] for row in rows}
    fleet.start(concurrency=20)
    settled()
    assert jobs.count("status <> 'completed'") == 0
