"""``client.webhooks`` on the real app, both kinds of client, and what a receiver makes of it."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from uuid import UUID, uuid4

import psycopg
import pytest

from jobs.client import JobClient, RequestFailed, WebhookNotVerified, verify_webhook
from jobs.database import make_pool
from jobs.deliveries import Deliverer
from jobs.errors import InvalidInput
from jobs.outbound import Rules
from jobs.settings import Settings
from tests.integration.test_client import api, client, connect, proxy, token
from tests.live import FaultyProxy
from tests.receiver import receiving
from tests.streams import Work

__all__ = ["api", "client", "connect", "proxy", "token"]

URL = "https://receiver.example.org/hook"


def deliver(settings: Settings, delivery: UUID) -> None:
    async def once() -> None:
        rules = Rules(networks=(ip_network("127.0.0.0/8"),))
        async with make_pool(settings, name="test") as pool:
            await Deliverer(pool, None, rules).deliver(delivery)

    asyncio.run(once())


def test_endpoints(client: JobClient, proxy: FaultyProxy) -> None:
    made = client.webhooks.create(URL, ["job.failed"], "mine")
    assert made.secret.startswith("whsec_")
    assert made.secret not in f"{made!r} {made}"  # as it would stand in logs
    (listed,) = client.webhooks.endpoints()
    assert listed == client.webhooks.endpoint(str(made.id))
    assert (listed.url, listed.events, listed.description) == (URL, ["job.failed"], "mine")
    changed = client.webhooks.update(made.id, events=["job.completed"], enabled=False)
    assert (changed.events, changed.disabled_reason) == (["job.completed"], "owner")
    assert changed.description == "mine"
    changed = client.webhooks.update(made.id, description="", enabled=True)
    assert (changed.description, changed.disabled_reason) == (None, None)
    assert client.webhooks.rotate_secret(made.id, keep=timedelta()) != made.secret
    assert client.webhooks.rotate_secret().startswith("whsec_")
    proxy.faults = [("DELETE", "answer")]
    client.webhooks.delete(made.id)  # tried again, though gone the second time
    assert client.webhooks.endpoints() == []
    with pytest.raises(RequestFailed) as caught:
        client.webhooks.endpoint(made.id)
    assert caught.value.code == "endpoint_not_found"


def test_what_makes_a_secret_is_not_asked_for_twice(client: JobClient, proxy: FaultyProxy) -> None:
    proxy.faults = [("POST", "answer")]
    with pytest.raises(Exception, match="No pgscribe server answers"):
        client.webhooks.create(URL)
    assert proxy.seen("POST") == 1
    assert len(client.webhooks.endpoints()) == 1


def test_deliveries_are_listed_and_sent_again(
    client: JobClient, settings: Settings, database: str, user: UUID
) -> None:
    began = datetime.now(UTC) - timedelta(minutes=1)
    with receiving() as receiver:
        made = client.webhooks.create(receiver.url)
        sent = client.webhooks.send_test(made.id)
        assert (sent.event, sent.status) == ("webhook.test", "queued")
        with Work(database) as work:
            job = work.insert(user)
            work.start(job)
            work.set_queue_status("failed", job)
        (of_job,) = client.webhooks.deliveries(job=job)
        assert (of_job.event, of_job.endpoint_id) == ("job.failed", made.id)
        deliver(settings, of_job.id)
        (request,) = receiver.expect(1)
        event = verify_webhook(made.secret, request.headers, request.body)
        assert (event["type"], event["data"]["id"]) == ("job.failed", str(job))
        for secret, body in ((made.secret, request.body + b" "), ("whsec_b3RoZXI=", request.body)):
            with pytest.raises(WebhookNotVerified, match="No matching signature"):
                verify_webhook(secret, request.headers, body)
        with pytest.raises(WebhookNotVerified):
            verify_webhook(made.secret, {}, request.body)
        for unset in ("", "whsec_", "whsec_!"):  # in nobody's name, or everybody's
            with pytest.raises(InvalidInput, match="secret"):
                verify_webhook(unset, request.headers, request.body)
    log = client.webhooks.delivery(of_job.id)
    assert log.payload["type"] == "job.failed"
    assert [attempt.response_status for attempt in log.log] == [204]
    assert [found.id for found in client.webhooks.deliveries(limit=1)] == [of_job.id]
    assert {found.id for found in client.webhooks.deliveries(endpoint=made.id)} == {
        of_job.id,
        sent.id,
    }
    assert client.webhooks.replay(of_job.id).status == "queued"
    assert client.webhooks.replay_all(began, status="failed") == 0
    assert client.webhooks.replay_all(began, until=datetime.now(UTC), endpoint=made.id) == 0


def test_unusable_arguments_are_refused_before_anything_is_sent(
    client: JobClient, proxy: FaultyProxy
) -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: client.webhooks.endpoint("mine"), "endpoint_id"),
        (lambda: client.webhooks.delivery("last"), "delivery_id"),
        (lambda: list(client.webhooks.deliveries(job="x")), "job"),
        (lambda: client.webhooks.replay_all(datetime(2026, 11, 26)), "since"),  # noqa: DTZ001 - that is it
    ]
    for call, field in calls:
        with pytest.raises(InvalidInput) as caught:
            call()
        assert caught.value.field == field
    assert proxy.requests == []


@pytest.mark.usefixtures("token")
def test_what_is_not_there(client: JobClient, conn: psycopg.Connection) -> None:
    for call in (client.webhooks.replay, client.webhooks.delivery):
        with pytest.raises(RequestFailed) as caught:
            call(uuid4())
        assert (caught.value.status, caught.value.code) == (404, "delivery_not_found")
    assert conn.execute("select count(*) from webhook_deliveries").fetchone() == (0,)
