"""From a recording to a receiver in a process of its own, with all that is real between them."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import ffmpeg
import httpx2
import imageio_ffmpeg
import psycopg
import pytest

from jobs import deliveries
from jobs.client import JobClient
from jobs.settings import Settings
from tests import ports
from tests.conftest import REPO
from tests.integration.test_webhooks import delivering, settled
from tests.live import serve
from web.app import create_app
from web.auth import issue_token

PATIENCE = 120.0  # seconds in which a busy machine transcribes six seconds


@contextmanager
def receiving(port: int, secret: str) -> Iterator[list[str]]:
    """Run the example's receiver; yield the lines that it says."""
    process = subprocess.Popen(
        [sys.executable, str(REPO / "examples" / "receive_webhooks.py"), str(port)],
        env=os.environ | {"WEBHOOK_SECRET": secret},
        stdout=subprocess.PIPE,
        text=True,
    )
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        lines.extend(map(str.strip, process.stdout))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield lines
    finally:
        process.terminate()
        process.wait(60)
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def port() -> Iterator[int]:
    with ports.reserved() as port:
        yield port


@pytest.fixture
def clip(sample: Path, tmp_path: Path) -> Path:
    """The first 6 s of the sample."""
    path = tmp_path / "clip.wav"
    recording = ffmpeg.input(str(sample), t=6).output(str(path), ac=1, ar=16000)
    recording.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    return path


def test_a_receiver_hears_of_a_transcript_once_though_it_was_not_there_at_first(
    settings: Settings, conn: psycopg.Connection, user: UUID, port: int, clip: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(deliveries, "PAUSES", (1,) * 100)  # until the receiver has started
    networks = Settings.load(database_url="x", webhook_networks="127.0.0.0/8").webhook_networks
    settings = settings.model_copy(update={"webhook_networks": networks})
    token = issue_token(settings, user, lifetime=600)
    with serve(create_app(settings)) as base, JobClient(base, token) as client:
        with httpx2.Client(base_url=base, headers={"Authorization": f"Bearer {token}"}) as http:
            url = f"http://127.0.0.1:{port}/"
            endpoint = http.post("/webhooks/endpoints", json={"url": url}).json()
        with delivering(settings, transcribes=True):
            job = client.submit(client.upload(clip))
            assert client.wait(job, PATIENCE).status == "completed"
            with receiving(port, endpoint["secret"]) as lines:
                (row,) = settled(conn)
                for _ in range(2):
                    conn.execute("select replay_webhook_delivery(%s)", (row["id"],))
                    settled(conn)
    assert lines == [f"job.completed {job}"]
    assert row["attempts"] > 1
    codes = conn.execute("select error_code from webhook_attempts order by attempt").fetchall()
    assert codes[0] == ("webhook_failed",)
    assert [code for (code,) in codes[-3:]] == [None, None, None]
