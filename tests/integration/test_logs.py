"""What real processes log while all goes wrong: never a secret, in either form."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit
from uuid import UUID

import httpx2
import psycopg
import pytest

from jobs import keys
from jobs.scopes import Scope
from jobs.settings import Settings
from tests import ports, processes
from tests.faults.fleet import until
from tests.receiver import Answer, Receiver, receiving
from web.auth import issue_token

FORMS = {  # with different workers, so that more goes wrong
    "json": {"PGSCRIBE_LOG_FORMAT": "json", "PGSCRIBE_COMPUTE": "modal"},
    "text": {"PGSCRIBE_LOG_FORMAT": "text", "PGSCRIBE_COMPUTE": "local"},
}
SECRETS = {
    "PGSCRIBE_JWT_SECRET": "the-secret-that-signs-every-token-of-ours",
    "PGSCRIBE_SUPABASE_SECRET_KEY": "sb_secret_OfTheProject",
    "MODAL_TOKEN_SECRET": "as-ModalTokenSecret1",
    "OTEL_EXPORTER_OTLP_HEADERS": "x-team=key-of-the-collector",
}
OTHERS = {
    "MODAL_TOKEN_ID": "ak-ModalTokenId1",
    "MODAL_SERVER_URL": "http://127.0.0.1:9",  # where nobody listens
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    "OTEL_BSP_SCHEDULE_DELAY": "100",
    "PGSCRIBE_COMPUTE_PATIENCE": "1",
    "PGSCRIBE_MAX_ATTEMPTS": "1",
    "PGSCRIBE_PUBLIC_URL": "http://127.0.0.1:9",
    "PGSCRIBE_WEBHOOK_NETWORKS": "127.0.0.0/8",
    "PGSCRIBE_WORKER_CONCURRENCY": "10",
}
ALLOWED = {
    "timestamp", "level", "logger", "message", "exception", "request_id", "job_id", "attempt",
    "delivery", "worker", "task", "queue_job", "trace_id", "span_id",
}  # fmt: skip
PACKAGES = {"web": {"uvicorn", "psycopg"}, "worker": {"jobs", "procrastinate"}}


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        receiver.default = Answer(500, body=b"the answer of a receiver that fails")
        yield receiver


def provoke(
    http: httpx2.Client, token: str, key: str, user: UUID, receiver: Receiver
) -> dict[str, str]:
    """Have a web server and the workers meet secrets, right and wrong; return them."""
    link = http.post("/uploads", json={"name": "a.wav", "size": 44}).raise_for_status().json()
    endpoint = http.post("/webhooks/endpoints", json={"url": f"{receiver.url}?key=of-a-hook"})
    signed = urlsplit(link["url"]).path
    http.put(signed, content=b"x" * 44).raise_for_status()
    http.put(f"{signed}x", content=b"x" * 44)
    for bad in (f"{token}x", f"{key[:-1]}0", "Basic of-somebody"):
        http.get("/jobs", headers={"Authorization": f"Bearer {bad}"})
    http.get("/jobs", headers={"Authorization": f"Bearer {key}"}).raise_for_status()
    http.get(f"/audio/{token}?download=1")
    http.get("/app/sign-in/confirm?token_hash=of-an-email")
    jobs = [
        {"filePath": link["filePath"]},
        {"audioUrl": "http://audio.invalid/a.mp3?token=of-the-audio"},
        {"filePath": f"{user}/nothing.wav", "webhookUrl": f"{receiver.url}?key=of-a-job"},
    ]
    http.post("/process/batch", json={"jobs": jobs}).raise_for_status()
    return {
        "a signed link": signed.rpartition("/")[2],
        "a secret of a webhook": endpoint.raise_for_status().json()["secret"],
        "an API key": key[13:],
        "a token": token.split(".")[2],
        "an e-mail's link": "of-an-email",
        "where audio is": "of-the-audio",
        "where a webhook goes": "of-a-hook",
        "where a job's webhook goes": "of-a-job",
        "what a receiver said": "the answer of a receiver",
    }


def test_no_secret_gets_into_a_log_whatever_goes_wrong(
    settings: Settings, conn: psycopg.Connection, user: UUID, tmp_path: Path, receiver: Receiver
) -> None:
    token = issue_token(
        Settings.load(database_url="x", jwt_secret=SECRETS["PGSCRIBE_JWT_SECRET"]),
        user, lifetime=600,
    )  # fmt: skip
    _, key = keys.create(conn, "ours", user_id=user, scopes=[Scope.JOBS_READ])
    headers = {"Authorization": f"Bearer {token}"}
    secrets = dict(SECRETS)
    with ExitStack() as stack:
        urls = []
        for form, chosen in FORMS.items():
            environment = processes.environment(settings, **SECRETS, **OTHERS, **chosen)
            port = stack.enter_context(ports.reserved())
            urls.append(f"http://127.0.0.1:{port}")
            for arguments in (("web", "--port", str(port)), ("worker",)):
                log = tmp_path / f"{arguments[0]}.{form}"
                stack.enter_context(processes.command(log, environment, *arguments))
        for number, url in enumerate(urls):
            processes.wait_for_web(url)
            with httpx2.Client(base_url=url, headers=headers, timeout=30) as http:
                found = provoke(http, token, key, user, receiver)
                secrets |= {f"{what} {number}": secret for what, secret in found.items()}
        left = "select count(*) from processing_jobs where completed_at is null"
        until(lambda: conn.execute(left.encode()).fetchone() == (0,), "all jobs have ended")
        receiver.expect(4)  # at least: each web server's jobs have an endpoint, and a URL of one

        def says(file: str, words: str) -> None:
            log = tmp_path / file
            until(lambda: words in log.read_text(encoding="utf-8"), f"{file}: {words}")

        says("worker.json", "Modal does not answer")
        secrets["the database's password"] = conn.info.password
        close(settings)
        for form, url in zip(FORMS, urls, strict=True):
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.get(f"{url}/jobs", headers=headers, timeout=0.2)
            says(f"web.{form}", "error connecting")
            says(f"worker.{form}", "The database does not answer")
    for process in ("web", "worker"):
        for form in FORMS:
            said = (tmp_path / f"{process}.{form}").read_text(encoding="utf-8")
            for what, secret in secrets.items():
                assert len(secret) > 5
                assert secret not in said, (process, form, what)
            assert "…" in said or process == "worker"
        text = (tmp_path / f"{process}.json").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        assert all(line.keys() >= {"timestamp", "level", "logger", "message"} for line in lines)
        assert all(line.keys() <= ALLOWED for line in lines)
        assert {line["logger"].partition(".")[0] for line in lines} >= PACKAGES[process]


def close(settings: Settings) -> None:
    """Let nobody connect to the database any more, and nobody stay."""
    url = urlsplit(settings.database_url.get_secret_value())
    name = url.path[1:]
    with psycopg.connect(url._replace(path="/postgres").geturl(), autocommit=True) as conn:
        conn.execute(f"alter database {name} allow_connections false".encode())
        conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name like 'pgscribe %%' and datname = %s", (name,)
        )  # fmt: skip
