"""Webhooks over REST: endpoints, secrets, the log of deliveries, and sending again."""

from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import httpx2
import psycopg
import pytest

from jobs.settings import Settings
from tests.conftest import MakeUser
from tests.live import serve
from tests.streams import Work
from web.app import create_app
from web.auth import issue_token

Open = Callable[..., httpx2.Client]
URL = "https://example.org/hook"


@pytest.fixture
def base(settings: Settings) -> Iterator[str]:
    with serve(create_app(settings.model_copy(update={"rate_limit": 0}))) as url:
        yield url


@pytest.fixture
def as_user(base: str, settings: Settings) -> Iterator[Callable[[Any], httpx2.Client]]:
    opened = []

    def open_it(user: Any) -> httpx2.Client:
        token = issue_token(settings, user, lifetime=600)
        headers = {"Authorization": f"Bearer {token}"}
        opened.append(httpx2.Client(base_url=base, headers=headers, timeout=20))
        return opened[-1]

    yield open_it
    for client in opened:
        client.close()


@pytest.fixture
def http(as_user: Open, user: Any) -> httpx2.Client:
    return as_user(user)


@pytest.fixture
def work(database: str) -> Iterator[Work]:
    with Work(database) as work:
        yield work


def made(http: httpx2.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/webhooks/endpoints", json={"url": URL} | body)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def problem(answer: httpx2.Response) -> tuple[int, str, str | None]:
    said = answer.json()
    return answer.status_code, said["code"], said.get("field")


def test_an_endpoint_is_made_shown_changed_and_deleted(http: httpx2.Client) -> None:
    endpoint = made(http, description="mine", events=["job.failed"])
    secret = endpoint.pop("secret")
    assert secret.startswith("whsec_")
    path = f"/webhooks/endpoints/{endpoint['id']}"
    assert http.get(path).json() == endpoint
    assert http.get("/webhooks/endpoints").json() == {"endpoints": [endpoint]}
    changed = http.patch(path, json={"url": f"{URL}/2", "events": ["job.completed"]}).json()
    assert (changed["url"], changed["events"], changed["description"]) == (
        f"{URL}/2", ["job.completed"], "mine",
    )  # fmt: skip
    assert http.patch(path, json={"description": None}).json()["description"] is None
    off = http.patch(path, json={"enabled": False}).json()
    assert (off["disabled_reason"], off["disabled_at"] is None) == ("owner", False)
    again = http.patch(path, json={"enabled": False}).json()
    assert again["disabled_at"] == off["disabled_at"]
    assert http.patch(path, json={"enabled": True}).json()["disabled_at"] is None
    assert http.delete(path).status_code == 204
    assert problem(http.get(path)) == (404, "endpoint_not_found", None)
    assert problem(http.delete(path)) == (404, "endpoint_not_found", None)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"url": "http://user:password@example.org"}, "url"),
        ({"url": "javascript:alert(1)"}, "url"),
        ({}, "url"),
        ({"url": URL, "events": []}, "events"),
        ({"url": URL, "events": ["job.lost"]}, "events[0]"),
        ({"url": URL, "description": "x" * 201}, "description"),
        ({"url": URL, "secret": "mine"}, "secret"),
        ({"url": URL, "description": "a\0b"}, None),
    ],
)
def test_what_is_no_good_is_refused_and_named(
    http: httpx2.Client, body: dict[str, Any], field: str | None
) -> None:
    assert problem(http.post("/webhooks/endpoints", json=body)) == (422, "invalid_input", field)
    assert http.get("/webhooks/endpoints").json() == {"endpoints": []}


def test_the_eleventh_endpoint_is_refused(http: httpx2.Client) -> None:
    for _ in range(10):
        made(http)
    answer = http.post("/webhooks/endpoints", json={"url": URL})
    assert problem(answer) == (422, "invalid_input", "url")
    assert "the limit is 10" in answer.json()["detail"]


def test_secrets_are_replaced(http: httpx2.Client, conn: psycopg.Connection) -> None:
    endpoint = made(http)
    path = f"/webhooks/endpoints/{endpoint['id']}/secret"
    second = http.post(path, json={}).json()["secret"]
    third = http.post(path, json={"keep_seconds": 0}).json()["secret"]
    own = http.post("/webhooks/secret", json={"keep_seconds": 60}).json()["secret"]
    assert len({endpoint["secret"], second, third, own}) == 4
    live = "select count(*) from pgscribe.webhook_secrets where expires_at is null"
    assert conn.execute(live).fetchone() == (2,)
    assert problem(http.post(path, json={"keep_seconds": 604801})) == (
        422, "invalid_input", "keep_seconds",
    )  # fmt: skip


def test_deliveries_are_listed_by_page_and_by_what_they_are(
    http: httpx2.Client, work: Work, user: Any, conn: psycopg.Connection
) -> None:
    first, second = made(http)["id"], made(http, events=["job.failed"])["id"]
    jobs = work.insert_many(user, 5)
    work.start(*jobs)
    work.complete(*jobs[:4])
    work.set_queue_status("failed", jobs[4])
    found: list[dict[str, Any]] = []
    cursor = None
    while cursor is not None or not found:
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = http.get("/webhooks/deliveries", params=query).json()
        found += page["deliveries"]
        cursor = page["next_cursor"]
    assert len({one["id"] for one in found}) == len(found) == 6

    def listed(**query: Any) -> list[dict[str, Any]]:
        page: list[dict[str, Any]] = http.get("/webhooks/deliveries", params=query).json()[
            "deliveries"
        ]
        return page

    assert {one["endpoint_id"] for one in listed(endpoint=second)} == {second}
    assert {one["event"] for one in listed(endpoint=second)} == {"job.failed"}
    assert len(listed(endpoint=first)) == 5
    assert [one["job_id"] for one in listed(job=str(jobs[0]))] == [str(jobs[0])]
    assert (len(listed(status="queued")), listed(status="failed")) == (6, [])
    assert problem(http.get("/webhooks/deliveries?status=lost"))[:2] == (422, "invalid_input")
    # What was sent is shown with what it says, and can be sent again.
    conn.execute(
        "select pgscribe.record_delivery(%s, 0.25, 500, 'no', 'webhook_failed', 'it said no')",
        (found[0]["id"],),
    )
    shown = http.get(f"/webhooks/deliveries/{found[0]['id']}").json()
    assert shown["payload"]["data"]["id"] == found[0]["job_id"]
    ((attempt),) = shown["log"]
    assert (attempt["attempt"], attempt["response_status"], attempt["response_excerpt"]) == (
        1, 500, "no",
    )  # fmt: skip


def test_what_has_failed_is_sent_again(
    http: httpx2.Client, work: Work, user: Any, conn: psycopg.Connection
) -> None:
    endpoint = made(http)["id"]
    jobs = work.insert_many(user, 3)
    work.start(*jobs)
    work.complete(*jobs)
    fail = (
        "update procrastinate.procrastinate_jobs set status = 'failed'"
        " where queue_name = 'webhooks'"
    )
    conn.execute(fail)
    (one, *_) = http.get("/webhooks/deliveries?status=failed").json()["deliveries"]
    again = http.post(f"/webhooks/deliveries/{one['id']}/replay").json()
    assert (again["id"], again["status"], again["completed_at"]) == (one["id"], "queued", None)
    since = {"since": one["created_at"]}
    assert http.post("/webhooks/replay", json=since | {"endpoint": endpoint}).json() == {
        "replayed": 2
    }
    assert http.post("/webhooks/replay", json=since).json() == {"replayed": 0}
    conn.execute(fail)
    http.patch(f"/webhooks/endpoints/{endpoint}", json={"enabled": False})
    answer = http.post(f"/webhooks/deliveries/{one['id']}/replay")
    assert problem(answer) == (422, "invalid_input", "endpoint_id")
    assert "Enable it first" in answer.json()["detail"]
    assert http.post("/webhooks/replay", json=since).json() == {"replayed": 0}


def test_what_is_not_ones_own_is_not_found(
    http: httpx2.Client, as_user: Open, make_user: MakeUser, work: Work, user: Any
) -> None:
    endpoint = made(http)["id"]
    job = work.insert(user)
    work.execute("select cancel_processing_job(%s)", (job,))
    (delivery,) = http.get("/webhooks/deliveries").json()["deliveries"]
    stranger = as_user(make_user())
    for method, path, body in (
        ("GET", f"/webhooks/endpoints/{endpoint}", None),
        ("PATCH", f"/webhooks/endpoints/{endpoint}", {"enabled": False}),
        ("DELETE", f"/webhooks/endpoints/{endpoint}", None),
        ("POST", f"/webhooks/endpoints/{endpoint}/secret", {}),
        ("POST", f"/webhooks/endpoints/{endpoint}/test", None),
        ("GET", f"/webhooks/deliveries/{delivery['id']}", None),
        ("POST", f"/webhooks/deliveries/{delivery['id']}/replay", None),
    ):
        answer = stranger.request(method, path, json=body)
        kind = "endpoint" if "endpoints" in path else "delivery"
        assert problem(answer) == (404, f"{kind}_not_found", None), path
    for path in (f"/webhooks/endpoints/{uuid4()}", "/webhooks/endpoints/x"):
        assert problem(http.get(path)) == (404, "endpoint_not_found", None)
    assert problem(http.get("/webhooks/deliveries/x")) == (404, "delivery_not_found", None)
    assert stranger.get("/webhooks/deliveries").json()["deliveries"] == []


def test_a_test_waits_to_be_sent(http: httpx2.Client) -> None:
    endpoint = made(http)["id"]
    waits = http.post(f"/webhooks/endpoints/{endpoint}/test").json()
    assert (waits["event"], waits["status"], waits["job_id"]) == ("webhook.test", "queued", None)
    for _ in range(9):
        assert http.post(f"/webhooks/endpoints/{endpoint}/test").status_code == 200
    answer = http.post(f"/webhooks/endpoints/{endpoint}/test")
    assert problem(answer)[:2] == (429, "limit_reached")
    assert answer.headers["retry-after"] == "60"
