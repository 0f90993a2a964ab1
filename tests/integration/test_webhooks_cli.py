"""`pgscribe webhooks`: everybody's endpoints, secrets, deliveries and replays."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, get_args
from uuid import UUID, uuid4

import psycopg
import pytest
from click.testing import CliRunner, Result

from jobs import webhook_admin
from jobs import webhooks as owners
from jobs.cli import main
from jobs.cli.webhooks import EVENTS, STATUSES
from jobs.settings import Settings
from tests.conftest import MakeUser
from tests.streams import Work

Run = Callable[..., Result]
URL = "https://example.org/hook"
FAIL = "update procrastinate.procrastinate_jobs set status = 'failed' where queue_name = 'webhooks'"


@pytest.fixture
def pgscribe(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", settings.database_url.get_secret_value())

    def run(*arguments: object) -> Result:
        result = CliRunner().invoke(main, ["webhooks", *map(str, arguments)])
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result

    return run


@pytest.fixture
def work(database: str) -> Iterator[Work]:
    with Work(database) as work:
        yield work


def done(result: Result) -> str:
    """Return what a command has printed that succeeded."""
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def made(pgscribe: Run, user: UUID, url: str = URL) -> UUID:
    """Make an endpoint and return its id."""
    done(pgscribe("create", url, "--user", user))
    return UUID(done(pgscribe("endpoints", "--user", user)).splitlines()[-1].split()[0])


def failed(work: Work, user: UUID, count: int = 1) -> list[UUID]:
    """Have jobs end, fail all deliveries that wait, and return those of the user's."""
    jobs = work.insert_many(user, count)
    work.start(*jobs)
    work.complete(*jobs)
    work.execute(FAIL)
    rows = work.execute(
        "select id from webhook_deliveries where job_id = any (%s) order by created_at, id", (jobs,)
    )
    return [row[0] for row in rows]


def statuses(conn: psycopg.Connection) -> dict[UUID, str]:
    return dict(conn.execute("select id, status from webhook_deliveries").fetchall())


def test_the_choices_are_those_of_the_database() -> None:
    assert EVENTS == owners.EVENTS
    assert get_args(owners.DeliveryStatus) == STATUSES


# Endpoints and secrets ---------------------------------------------------------------------------


def test_an_endpoint_is_made_and_its_secret_printed_once(
    pgscribe: Run, conn: psycopg.Connection, make_user: MakeUser
) -> None:
    user, other = make_user(), make_user()
    result = pgscribe(
        "create", URL, "--user", user, "--event", "job.failed", "--event", "job.completed",
        "--description", "a\x1b[2J\nb",
    )  # fmt: skip
    secret = done(result)
    assert conn.execute("select secret from pgscribe.webhook_secrets").fetchall() == [(secret,)]
    listed = done(pgscribe("endpoints"))
    assert listed.splitlines() == [
        f"{listed.split()[0]}  {user}  enabled             job.completed,job.failed  {URL}  a [2J b"
    ]
    assert listed.split()[0] in result.stderr
    assert "not shown again" in result.stderr
    assert secret not in listed + result.stderr
    done(pgscribe("create", f"{URL}/2", "--user", other))
    assert len(done(pgscribe("endpoints")).splitlines()) == 2
    assert f"{URL}/2" in done(pgscribe("endpoints", "--user", other))
    assert done(pgscribe("endpoints", "--user", make_user())) == ""


def secrets(conn: psycopg.Connection, user: UUID) -> list[tuple[Any, ...]]:
    """Return an owner's secrets, and for how long from now on: newest first."""
    return conn.execute(
        "select endpoint_id, secret, extract(epoch from expires_at - created_at) / 3600"
        " from (select *, max(created_at) over () from pgscribe.webhook_secrets) s"
        " where user_id = %s order by id desc",
        (user,),
    ).fetchall()


def test_secrets_are_replaced(pgscribe: Run, conn: psycopg.Connection, user: UUID) -> None:
    endpoint = made(pgscribe, user)
    old = secrets(conn, user)[0][1]
    result = pgscribe("rotate", endpoint, "--keep", "2d")
    new, kept = secrets(conn, user)
    assert (new[:2], kept[:2]) == ((endpoint, done(result)), (endpoint, old))
    assert "48 h" in result.stderr
    assert kept[2] == pytest.approx(48, abs=0.1)
    result = pgscribe("rotate", endpoint, "--keep", "0h")
    assert "as well" not in result.stderr
    good = "select count(*) from pgscribe.webhook_secrets where coalesce(expires_at > now(), true)"
    assert conn.execute(good).fetchone() == (1,)
    own = done(pgscribe("rotate", "--user", user))
    assert secrets(conn, user)[0][:2] == (None, own)


def test_endpoints_are_disabled_and_enabled(
    pgscribe: Run, conn: psycopg.Connection, user: UUID
) -> None:
    first, second, unknown = made(pgscribe, user), made(pgscribe, user), uuid4()
    result = pgscribe("disable", first, unknown, second)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{first}  disabled (owner)", f"{second}  disabled (owner)",
    ]  # fmt: skip
    assert result.stderr == (
        f"{unknown}  There is no webhook endpoint {unknown}; "
        "`pgscribe webhooks endpoints` lists them\n"
    )
    assert "disabled (owner)" in done(pgscribe("endpoints"))
    assert done(pgscribe("enable", first)) == f"{first}  enabled"
    on = "select id from webhook_endpoints where disabled_at is null"
    assert conn.execute(on).fetchall() == [(first,)]


def test_a_test_waits_to_be_sent(pgscribe: Run, conn: psycopg.Connection, user: UUID) -> None:
    endpoint = made(pgscribe, user)
    result = pgscribe("test", endpoint)
    row = conn.execute("select id, user_id, event, status from webhook_deliveries").fetchone()
    assert row == (UUID(done(result)), user, "webhook.test", "queued")
    assert f"pgscribe webhooks show {row[0]}" in result.stderr
    for _ in range(9):
        done(pgscribe("test", endpoint))
    refused = pgscribe("test", endpoint)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "10 tests in a minute" in refused.stderr
    pgscribe("disable", endpoint)
    refused = pgscribe("test", endpoint)
    assert (refused.exit_code, f"pgscribe webhooks enable {endpoint}" in refused.stderr) == (
        1,
        True,
    )


# Deliveries --------------------------------------------------------------------------------------


def test_deliveries_are_listed_newest_first(
    pgscribe: Run, conn: psycopg.Connection, make_user: MakeUser, work: Work
) -> None:
    user, other = make_user(), make_user()
    endpoint = made(pgscribe, user, f"{URL}/mine")
    made(pgscribe, other, f"{URL}/theirs")
    (mine,), (theirs,) = failed(work, user), failed(work, other)
    conn.execute(
        "select pgscribe.record_delivery(%s, 1, 500, 'no', 'webhook_failed', 'it said no')", (mine,)
    )
    newest = UUID(done(pgscribe("test", endpoint)))

    def listed(*options: object) -> list[UUID]:
        lines = done(pgscribe("deliveries", *options)).splitlines()
        return [UUID(line.split()[0]) for line in lines]

    assert listed() == [newest, theirs, mine]
    assert listed("--limit", 1) == [newest]
    assert listed("--user", user) == listed("--endpoint", endpoint) == [newest, mine]
    assert listed("--status", "failed") == [theirs, mine]
    assert listed("--status", "failed", "--user", user) == [mine]
    assert listed("--status", "sending") == []
    line = done(pgscribe("deliveries", "--status", "failed", "--user", user))
    age, rest = line.removeprefix(str(mine)).split(" ago  ")
    assert age.strip().startswith("0:00:")
    assert rest.split() == [
        "job.completed", "failed", "1x", "500", f"{URL}/mine", "it", "said", "no",
    ]  # fmt: skip


def test_a_delivery_is_shown_with_its_payload_and_its_requests(
    pgscribe: Run, conn: psycopg.Connection, user: UUID, work: Work
) -> None:
    endpoint = made(pgscribe, user)
    (delivery,) = failed(work, user)
    for status in (500, 503):
        conn.execute(
            "select pgscribe.record_delivery(%s, 1, %s, 'no', 'webhook_failed', 'it said no')",
            (delivery, status),
        )
    shown = json.loads(done(pgscribe("show", delivery)))
    assert (shown["id"], shown["endpoint_id"]) == (str(delivery), str(endpoint))
    assert (shown["user_id"], shown["target"]) == (str(user), URL)
    assert shown["payload"]["data"]["id"] == shown["job_id"]
    assert [(one["attempt"], one["response_status"]) for one in shown["log"]] == [
        (1, 500),
        (2, 503),
    ]
    unknown = pgscribe("show", uuid4())
    assert (unknown.exit_code, "pgscribe webhooks deliveries" in unknown.stderr) == (1, True)


# Once more ---------------------------------------------------------------------------------------


def test_deliveries_are_sent_again_and_those_that_cannot_be_are_named(
    pgscribe: Run, conn: psycopg.Connection, make_user: MakeUser, work: Work
) -> None:
    user, other = make_user(), make_user()
    off = made(pgscribe, other)
    made(pgscribe, user)
    (mine,), (theirs,) = failed(work, user), failed(work, other)
    pgscribe("disable", off)
    unknown = uuid4()
    result = pgscribe("replay", unknown, theirs, mine, mine)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{mine}  is sent again", f"{mine}  has not ended yet and is left as it is", "1 sent again",
    ]  # fmt: skip
    about_unknown, about_theirs = result.stderr.splitlines()
    assert about_unknown.startswith(f"{unknown}  There is no delivery {unknown}")
    assert about_theirs.startswith(f"{theirs}  endpoint {off} is disabled")
    assert f"pgscribe webhooks enable {off}" in about_theirs
    assert statuses(conn) == {mine: "queued", theirs: "failed"}
    pgscribe("enable", off)
    assert done(pgscribe("replay", theirs)).endswith("1 sent again")


def test_what_has_failed_since_then_is_sent_again(
    pgscribe: Run, conn: psycopg.Connection, make_user: MakeUser, work: Work
) -> None:
    user, other = make_user(), make_user()
    first, second, off = (
        made(pgscribe, user), made(pgscribe, user), made(pgscribe, other),
    )  # fmt: skip
    failed(work, user, 2)
    failed(work, other)
    old = failed(work, user)
    conn.execute(
        "update webhook_deliveries set created_at = now() - interval '3 hours' where id = any (%s)",
        (old,),
    )
    pgscribe("disable", off)

    def replayed(*options: object) -> str:
        return done(pgscribe("replay", "--failed-since", *options))

    soon = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    assert replayed("0h") == "0 sent again"
    assert replayed("2h", "--user", make_user()) == "0 sent again"
    assert replayed("2h", "--endpoint", first) == "2 sent again"
    assert replayed(soon, "--user", user, "--endpoint", second) == "2 sent again"
    assert {statuses(conn)[one] for one in old} == {"failed"}
    result = pgscribe("replay", "--failed-since", "1d")
    assert done(result) == "2 sent again"
    assert (
        f"1 not sent: their endpoint is disabled. To send them, pgscribe webhooks enable {off}"
        in (result.stderr)
    )
    assert sorted(statuses(conn).values()) == ["failed", *["queued"] * 6]


def test_any_number_is_sent_again_and_what_fails_meanwhile_is_left(
    pgscribe: Run,
    conn: psycopg.Connection,
    user: UUID,
    work: Work,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(webhook_admin, "MAX_REPLAYED", 2)
    made(pgscribe, user)
    failed(work, user, 5)
    # Whatever is sent again fails at once, when the batch has been committed.
    replay_batch = webhook_admin._replay_batch  # noqa: SLF001
    batches = []

    def and_fail(connection: Any, values: dict[str, Any]) -> Any:
        batches.append(replay_batch(connection, values))
        conn.execute(FAIL.encode())
        return batches[-1]

    monkeypatch.setattr(webhook_admin, "_replay_batch", and_fail)
    assert done(pgscribe("replay", "--failed-since", "1h")) == "5 sent again"
    assert [batch.replayed for batch in batches] == [2, 2, 1]


# What is no good -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", URL], ["--user"]),
        (["create", "ftp://example.org", "--user", "USER"], ["url: ", "http"]),
        (["create", URL, "--user", "NOBODY"], ["user: there is no user"]),
        (["create", URL, "--user", "anna"], ["--user", "UUID"]),
        (["create", URL, "--user", "USER", "--event", "job.lost"], ["--event", "job.failed"]),
        (["create", URL, "--user", "USER", "--description", "x" * 201], ["description: ", "200"]),
        (["create", f"{URL}/\udc80", "--user", "USER"], ["half a surrogate pair"]),
        (["endpoints", "--user", "NOBODY"], ["user: there is no user"]),
        (["rotate"], ["--user"]),
        (["rotate", "NOBODY", "--user", "USER"], ["--user"]),
        (["rotate", "NOBODY"], ["no webhook endpoint"]),
        (["rotate", "--user", "NOBODY"], ["user: there is no user"]),
        (["rotate", "--user", "USER", "--keep", "8d"], ["--keep", "from 0h to 7d"]),
        (["rotate", "--user", "USER", "--keep", "soon"], ["--keep", "24h"]),
        (["test", "NOBODY"], ["no webhook endpoint"]),
        (["enable"], ["ENDPOINT_IDS"]),
        (["enable", "x"], ["ENDPOINT_IDS", "UUID"]),
        (["deliveries", "--user", "NOBODY"], ["user: there is no user"]),
        (["deliveries", "--endpoint", "NOBODY"], ["no webhook endpoint"]),
        (["deliveries", "--status", "lost"], ["--status", "queued"]),
        (["deliveries", "--limit", "1001"], ["--limit", "1000"]),
        (["show", "x"], ["DELIVERY_ID", "UUID"]),
        (["replay"], ["--failed-since"]),
        (["replay", "NOBODY", "--failed-since", "6h"], ["--failed-since"]),
        (["replay", "NOBODY", "--user", "USER"], ["--failed-since only"]),
        (["replay", "--failed-since", "yesterday"], ["--failed-since", "6h"]),
        (["replay", "--failed-since", "2026-11-26"], ["--failed-since", "with its zone"]),
        (["replay", "--failed-since", "9999-01-01T00:00:00Z"], ["--failed-since", "future"]),
        (["replay", "--failed-since", "99999d", "--user", "NOBODY"], ["there is no user"]),
        (["replay", "--failed-since", "6h", "--endpoint", "NOBODY"], ["no webhook endpoint"]),
    ],
)
def test_what_is_no_good_is_named(
    pgscribe: Run, user: UUID, arguments: list[str], said: list[str]
) -> None:
    values = {"USER": str(user), "NOBODY": str(uuid4())}
    result = pgscribe(*(values.get(argument, argument) for argument in arguments))
    assert result.exit_code in {1, 2}
    assert result.stdout == ""
    # The message is broken into lines for terminals of some width.
    assert [part for part in said if part not in " ".join(result.stderr.split())] == []


def test_the_eleventh_endpoint_is_refused(pgscribe: Run, user: UUID) -> None:
    for _ in range(10):
        done(pgscribe("create", URL, "--user", user))
    refused = pgscribe("create", URL, "--user", user)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "the limit is 10" in refused.stderr
