"""The commands and the receiver of docs/webhooks.md; its SQL runs with that of docs/sql.md."""

import asyncio
import json
import os
import shlex
import subprocess
from ipaddress import ip_network
from typing import Any
from uuid import UUID

import psycopg
import pytest
from click.testing import CliRunner
from standardwebhooks.webhooks import WebhookVerificationError

from jobs.cli import main
from jobs.database import make_pool
from jobs.deliveries import Deliverer
from jobs.outbound import Rules
from jobs.settings import Settings
from tests.doc_blocks import Block, runs
from tests.live import serve
from tests.receiver import Request, receiving
from tests.streams import Work
from web.app import create_app
from web.auth import issue_token

BLOCKS = {block.how[1]: block for block in runs("webhooks")}


@pytest.fixture(autouse=True)
def _configured(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", settings.database_url.get_secret_value())


def pgscribe(*arguments: object) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_each_block_is_run() -> None:
    assert set(BLOCKS) == {"endpoint", "commands", "receiver", "request"}


def test_the_request_in_the_documentation(
    settings: Settings, user: UUID, conn: psycopg.Connection
) -> None:
    with serve(create_app(settings)) as url:
        environment = {
            "PATH": os.environ["PATH"],
            "PGSCRIBE_URL": url,
            "PGSCRIBE_TOKEN": issue_token(settings, user, lifetime=60),
        }
        done = subprocess.run(
            ["bash", "-ec", BLOCKS["endpoint"].code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    made = json.loads(done.stdout)
    stored = conn.execute("select endpoint_id::text, secret from pgscribe.webhook_secrets")
    assert stored.fetchall() == [(made["id"], made["secret"])]


def test_the_commands_in_the_documentation(database: str, user: UUID) -> None:
    values = {"$USER_ID": str(user)}
    # What can't be known before: the endpoint, as it is made, and a delivery of its own.
    printed = {}
    lines = BLOCKS["commands"].code.splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        printed[line.split("#")[0].strip()] = pgscribe(*(values.get(w, w) for w in words[1:]))
        if words[2] == "create":
            values["$ENDPOINT_ID"] = pgscribe("webhooks", "endpoints").split()[0]
            with Work(database) as work:
                job = work.insert(user)
                work.start(job)
                work.set_queue_status("failed", job)
                values["$DELIVERY_ID"] = pgscribe("webhooks", "deliveries").split()[0]
                work.execute(
                    "update procrastinate.procrastinate_jobs set status = 'failed'"
                    " where queue_name = 'webhooks'"
                )
    assert len(printed) == len(lines) >= 11
    assert printed["pgscribe webhooks replay $DELIVERY_ID"].endswith("1 sent again")
    assert printed["pgscribe webhooks replay --failed-since 6h"] == "0 sent again"
    shown = json.loads(printed["pgscribe webhooks show $DELIVERY_ID"])
    assert (shown["event"], shown["status"]) == ("job.failed", "failed")


def test_the_receiver_in_the_documentation(settings: Settings, user: UUID) -> None:
    with receiving() as receiver:
        secret = pgscribe("webhooks", "create", receiver.url, "--user", user)
        endpoint = pgscribe("webhooks", "endpoints").split()[0]
        delivery = UUID(pgscribe("webhooks", "test", endpoint))
        asyncio.run(deliver(settings, delivery))
        (request,) = receiver.expect(1)
    assert received(BLOCKS["receiver"], secret, request)["type"] == "webhook.test"
    other = pgscribe("webhooks", "rotate", endpoint)
    with pytest.raises(WebhookVerificationError):
        received(BLOCKS["receiver"], other, request)
    (attempt,) = json.loads(pgscribe("webhooks", "show", delivery))["log"]
    assert (attempt["attempt"], attempt["response_status"]) == (1, 204)


def test_a_request_is_as_the_documentation_has_it(
    settings: Settings, database: str, user: UUID
) -> None:
    head, _, body = BLOCKS["request"].code.partition("\n\n")
    first, *headers = head.splitlines()
    documented = json.loads(body)
    with receiving() as receiver, Work(database) as work:
        pgscribe("webhooks", "create", receiver.url, "--user", user)
        job = work.insert(user)
        work.start(job)
        work.execute("update processing_jobs set audio_seconds = 61.2 where id = %s", (job,))
        work.complete(job)
        ((delivery,),) = work.execute("select id from webhook_deliveries")
        asyncio.run(deliver(settings, delivery, "https://api.example.org"))
        (request,) = receiver.expect(1)
    told = json.loads(request.body)
    assert request.body.decode().startswith('{"data": {"attempt": 1, ')
    assert list(told) == list(documented)
    assert list(told["data"]) == list(documented["data"])
    assert (told["type"], told["data"]["status"]) == (documented["type"], "completed")
    assert told["data"]["url"].startswith(documented["data"]["url"].rstrip("…"))
    assert first.split()[0] == "POST"
    for name, value in (line.split(": ") for line in headers):
        assert len(request.headers[name.lower()]) == len(value), name


async def deliver(settings: Settings, delivery: UUID, public_url: str | None = None) -> None:
    rules = Rules(networks=(ip_network("127.0.0.0/8"),))
    async with make_pool(settings, name="test") as pool:
        await Deliverer(pool, public_url, rules).deliver(delivery)


def received(block: Block, secret: str, request: Request) -> Any:
    names = {"secret": secret, "body": request.body, "headers": request.headers}
    exec(compile(block.code, block.name, "exec"), names)
    return names["event"]
