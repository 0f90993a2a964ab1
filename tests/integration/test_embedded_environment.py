"""`make demo` and `make dev` as a user runs them: they work, and leave nothing behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest
from dotenv import dotenv_values

from db.embedded import EmbeddedPostgres
from jobs.dev import LOOPBACK, USER_ID, listen
from jobs.settings import Settings
from tests.receiver import receiving
from tests.streams import until

PGSCRIBE = [sys.executable, "-m", "jobs.cli"]


@pytest.fixture
def folder(tmp_path: Path, models_dir: Path) -> Iterator[Path]:
    """An empty folder, but for the weights that earlier tests have assembled."""
    (tmp_path / ".pgscribe").mkdir()
    models_dir.mkdir(parents=True, exist_ok=True)
    (tmp_path / ".pgscribe" / "models").symlink_to(models_dir)
    yield tmp_path
    EmbeddedPostgres(tmp_path / ".pgscribe" / "postgres").remove()


def processes_in(folder: Path) -> set[str]:
    """Return the command lines of processes that work in ``folder`` or name it."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_text().replace("\0", " ")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            here = str(folder) in command or (process / "cwd").readlink() == folder
            if here and state != "Z":
                found.add(command)
    return found


def wait_until_none_is_left(folder: Path, seconds: float = 30) -> set[str]:
    deadline = time.monotonic() + seconds
    while (left := processes_in(folder)) and time.monotonic() < deadline:
        os.sched_yield()
    return left


@pytest.fixture
def printed() -> dict[str, str]:
    """What `pgscribe dev` has printed: name and value of each line."""
    return {}


@pytest.fixture
def dev(folder: Path, printed: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """`pgscribe dev`, up."""
    process = subprocess.Popen(
        [*PGSCRIBE, "dev", "--port", "0"],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Try:"):
            break
        name, _, value = line.strip().partition("   ")
        printed[name] = value.strip()
    else:
        pytest.fail(f"pgscribe dev ended with status {process.wait()}; its standard error says why")
    yield process
    if process.poll() is None:
        process.terminate()
    process.wait(60)
    process.stdout.close()


def test_a_port_is_kept_from_the_moment_that_it_is_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as others, listen(0) as own:
        port = own.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port))
        with listen(others.getsockname()[1]) as elsewhere:
            assert elsewhere.getsockname()[1] not in {port, others.getsockname()[1]}


def test_dev_serves_other_commands_in_its_folder_until_ctrl_c(
    dev: subprocess.Popen[str], folder: Path, sample: Path
) -> None:
    def pgscribe(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PGSCRIBE, *arguments], cwd=folder, capture_output=True, text=True, check=False
        )

    assert (folder / ".pgscribe" / "dev.env").stat().st_mode & 0o077 == 0
    assert pgscribe("migrate", "--status").returncode == 0
    healthy = pgscribe("doctor", "--json", "--strict")
    assert healthy.returncode == 0, healthy.stdout
    statuses = {check["id"]: check["status"] for check in json.loads(healthy.stdout)["checks"]}
    assert [name for name, status in statuses.items() if status != "ok"] == ["modal"]
    secrets = dotenv_values(folder / ".pgscribe" / "dev.env")
    for name in ("PGSCRIBE_DATABASE_URL", "PGSCRIBE_JWT_SECRET", "PGSCRIBE_TOKEN"):
        assert str(secrets[name]) not in healthy.stdout + healthy.stderr
    done = pgscribe("transcribe", "--format", "json", "--word-timestamps", str(sample))
    assert done.returncode == 0, done.stderr
    transcript = json.loads(done.stdout)
    assert "lighthouse" in transcript["text"]
    assert transcript["segments"][0]["words"]
    assert "completed 100 %" in done.stderr
    (folder / "text.mp3").write_text("no sound")
    bad = pgscribe("transcribe", "text.mp3")
    assert bad.returncode == 1
    assert "text.mp3: failed: " in bad.stderr
    assert "completed" in pgscribe("jobs").stdout
    dev.send_signal(signal.SIGINT)
    assert dev.wait(60) == 0
    assert wait_until_none_is_left(folder) == set()
    assert not (folder / ".pgscribe" / "dev.env").exists()


@pytest.mark.usefixtures("dev")
def test_dev_prints_what_signs_in_to_the_web_app(folder: Path, printed: dict[str, str]) -> None:
    email = printed["e-mail"].partition(",")[0]
    origin = {"Origin": printed["REST API"]}
    with httpx2.Client(base_url=printed["REST API"], headers=origin) as browser:
        form = {"email": email, "password": printed["password"]}
        done = browser.post("/app/sign-in", data=form)
        assert printed["web app"].endswith(done.headers["location"])
        assert email in browser.get("/app").text
        assert browser.post("/process", json={"filePath": f"{USER_ID}/a.mp3"}).status_code == 202
        assert browser.get("/operate/overview").status_code == 200
    secret = folder / ".pgscribe" / "sign-in-password"
    assert secret.read_text() == printed["password"]
    assert secret.stat().st_mode & 0o077 == 0
    # Commands of other processes in this folder do not get it with their settings.
    assert printed["password"] not in (folder / ".pgscribe" / "dev.env").read_text()
    assert not any(printed["password"] in command for command in processes_in(folder))


def webhooks(folder: Path, *arguments: str) -> str:
    """Return what a command prints about the webhooks of a running environment."""
    command = [*PGSCRIBE, "webhooks", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.usefixtures("dev")
def test_dev_lets_webhooks_reach_this_machine_and_lead_back_to_it(
    folder: Path, printed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        url = f"http://localhost:{receiver.port}/hook"
        secret = webhooks(folder, "create", url, "--user", str(USER_ID))
        delivery = webhooks(folder, "test", webhooks(folder, "endpoints").split()[0])
        (request,) = receiver.expect(1)
        assert (request.verified(secret)["type"], request.id) == ("webhook.test", delivery)
        (folder / "text.mp3").write_text("no sound")
        subprocess.run([*PGSCRIBE, "transcribe", "text.mp3"], cwd=folder, check=False)
        (*_, told) = receiver.expect(2)
    token = {"Authorization": f"Bearer {printed['token']}"}
    job = httpx2.get(told.verified(secret)["data"]["url"], headers=token).json()
    assert (job["status"], job["error_code"]) == ("failed", "invalid_audio")
    monkeypatch.chdir(folder)  # as for another worker there
    assert ",".join(map(str, Settings.load().webhook_networks)) == LOOPBACK


@pytest.fixture
def _said_otherwise(folder: Path) -> None:
    (folder / ".env").write_text("PGSCRIBE_WEBHOOK_NETWORKS=10.0.0.0/8\n")


@pytest.mark.usefixtures("_said_otherwise", "dev")
def test_dev_leaves_alone_where_webhooks_may_go_if_somebody_has_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        webhooks(folder, "create", receiver.url, "--user", str(USER_ID))
        delivery = webhooks(folder, "test", webhooks(folder, "endpoints").split()[0])
        until(lambda: webhooks(folder, "deliveries", "--status", "failed"), "it has failed")
    assert json.loads(webhooks(folder, "show", delivery))["error_code"] == "url_refused"
    assert receiver.requests == []
    monkeypatch.chdir(folder)
    assert [*map(str, Settings.load().webhook_networks)] == ["10.0.0.0/8"]


def test_nothing_outlives_a_killed_dev_and_the_next_one_starts(
    dev: subprocess.Popen[str], folder: Path
) -> None:
    assert len(processes_in(folder)) >= 3
    told = folder / ".pgscribe" / "dev.env"
    names = [*dotenv_values(told)]
    dev.kill()
    dev.wait()
    assert wait_until_none_is_left(folder) == set()
    with subprocess.Popen(
        [*PGSCRIBE, "dev", "--port", "0"], cwd=folder, stdout=subprocess.PIPE, text=True
    ) as again:
        assert again.stdout is not None
        assert any("is up" in line for line in again.stdout)
        assert [*dotenv_values(told)] == names  # what the first one had set, nobody has said
        again.terminate()


def test_a_second_dev_in_the_same_folder_is_refused(
    dev: subprocess.Popen[str], folder: Path
) -> None:
    second = subprocess.run(
        [*PGSCRIBE, "dev"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert second.returncode == 1
    assert str(dev.pid) in second.stderr
    assert "Traceback" not in second.stderr


def test_demo(folder: Path, sample: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(sample.parent / "demo.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    error_rate = re.search(r"word error rate +([\d.]+)%", done.stdout)
    assert error_rate is not None
    assert float(error_rate[1]) <= 8
    assert "same transcript   yes" in done.stdout
    assert re.search(r"commit to start +\d+ ms", done.stdout)
    assert "[0:00.0 - " in done.stdout
    assert "processing" in done.stderr, "progress is shown"
    assert wait_until_none_is_left(folder) == set()


def test_demo_leaves_nothing_behind_after_ctrl_c(folder: Path, sample: Path) -> None:
    # Ctrl-C may fall into a lock of coverage's own, for which the end would then wait.
    unmeasured = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE_PROCESS")}
    demo = subprocess.Popen(
        [sys.executable, str(sample.parent / "demo.py")],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=unmeasured | {"PYTHONUNBUFFERED": "1"},
    )
    assert demo.stdout is not None
    with demo:
        try:
            assert any("Uploaded" in line for line in demo.stdout)
            demo.send_signal(signal.SIGINT)
            assert demo.wait(60) == 1
        finally:
            demo.kill()
    assert wait_until_none_is_left(folder) == set()
