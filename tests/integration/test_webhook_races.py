"""Webhooks where two are at it at the same time: workers, owners, and whoever has locked a row."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID

import psycopg
import pytest

from db.embedded import SUPERUSER, EmbeddedPostgres
from tests.conftest import MakeUser
from tests.streams import Work, until

CLAIM = "select cardinality(jobs) from pgscribe.claim_deliveries(%s, %s)"
TURN = "select {} from pgscribe.turn(%s, %s, %s, false, '{{maintenance}}', 3, null, 0, null)"
FORGET = "select pgscribe.forget_deliveries('1 minute')"
REGISTER = "select worker_id from procrastinate.procrastinate_register_worker_v1()"
QUEUE_JOBS = "select count(*) from procrastinate.procrastinate_jobs where queue_name = 'webhooks'"
SENDING = """
select coalesce(max(n), 0) from (
  select count(*) as n from webhook_deliveries where status = 'sending' group by user_id) s
"""


@pytest.fixture
def work(database: str) -> Iterator[Work]:
    work = Work(database)
    work.allow_many_jobs()
    yield work
    work.close()


@pytest.fixture
def other(database: str) -> Iterator[psycopg.Connection]:
    """Somebody else, in a transaction."""
    with psycopg.connect(database) as connection:
        yield connection


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def value(conn: psycopg.Connection, query: str, *values: object) -> Any:
    row = conn.execute(query.encode(), values).fetchone()
    assert row is not None
    return row[0]


def endpoint(conn: psycopg.Connection, user: UUID) -> UUID:
    query = "insert into webhook_endpoints (user_id, url) values (%s, 'https://example.org')"
    found: UUID = value(conn, query + " returning id", user)
    return found


def tell(work: Work, user: UUID, count: int = 1) -> None:
    jobs = work.insert_many(user, count)
    work.start(*jobs)
    work.complete(*jobs)


def wait_for_lock(conn: psycopg.Connection, waiting: psycopg.Connection) -> None:
    query = "select cardinality(pg_blocking_pids(%s)) > 0"
    until(lambda: value(conn, query, waiting.info.backend_pid), "it waits for a lock")


def test_workers_that_claim_at_the_same_time_keep_to_the_limit(
    conn: psycopg.Connection, database: str, work: Work, user: UUID, beside: ThreadPoolExecutor
) -> None:
    endpoint(conn, user)
    tell(work, user, 100)

    def claims() -> int:
        with psycopg.connect(database, autocommit=True) as own:
            worker, most = value(own, REGISTER), 0
            for _ in range(100):
                value(own, CLAIM, worker, 10)
                most = max(most, value(own, SENDING))
                own.execute(
                    "update procrastinate.procrastinate_jobs set status = 'todo'"
                    " where status = 'doing' and worker_id = %s",
                    (worker,),
                )
        return most

    running = [beside.submit(claims) for _ in range(2)]
    assert max(one.result() for one in running) == 5


def test_workers_that_claim_at_the_same_time_claim_different_ones(
    conn: psycopg.Connection, database: str, work: Work, make_user: MakeUser,
    other: psycopg.Connection, beside: ThreadPoolExecutor,
) -> None:  # fmt: skip
    for _ in range(4):
        owner = make_user()
        endpoint(conn, owner)
        tell(work, owner, 5)
    assert value(other, CLAIM, None, 10) == 10
    with psycopg.connect(database, autocommit=True) as second:
        claimed: Future[Any] = beside.submit(value, second, CLAIM, None, 10)
        wait_for_lock(conn, second)
        other.commit()
        assert claimed.result() == 10


@pytest.mark.parametrize("outcome", ["succeeded", "retry", "released"])
def test_with_an_endpoint_goes_what_is_being_sent_once_that_has_ended(
    conn: psycopg.Connection, work: Work, user: UUID, outcome: str
) -> None:
    endpoint(conn, user)
    tell(work, user)
    worker = value(conn, REGISTER)
    assert value(conn, CLAIM, worker, 1) == 1
    conn.execute("delete from webhook_endpoints")
    assert value(conn, FORGET) == 1
    assert value(conn, QUEUE_JOBS) == 1
    ended = [{"queue_job_id": value(conn, QUEUE_JOBS.replace("count(*)", "id")), "attempt": 0}]
    ended[0] |= {"outcome": outcome, "retry_after": 5}
    conn.execute(TURN.format("*").encode(), (worker, json.dumps(ended), 0))
    assert value(conn, QUEUE_JOBS) == 0


def test_what_wakes_both_kinds_of_slots_has_two_numbers(
    conn: psycopg.Connection, other: psycopg.Connection
) -> None:
    """Whoever has looked for one kind tells the others, who are to look for the other still."""
    for queue in ("transcription", "webhooks"):
        other.execute(f'listen "procrastinate_queue_v1#{queue}"'.encode())
    other.commit()
    conn.execute("select pgscribe.wake_workers()")
    heard = [json.loads(one.payload)["job_id"] for one in other.notifies(timeout=60, stop_after=2)]
    assert len(set(heard)) == 2


def test_a_secret_that_its_owner_has_just_made_is_used(
    conn: psycopg.Connection, database: str, work: Work, user: UUID,
    other: psycopg.Connection, beside: ThreadPoolExecutor,
) -> None:  # fmt: skip
    made = endpoint(conn, user)
    tell(work, user)
    delivery = value(conn, "select id from webhook_deliveries")
    secret = value(other, "select rotate_webhook_secret(%s)", made)
    with psycopg.connect(database, autocommit=True) as courier:
        query = "select pgscribe.begin_delivery(%s)"
        begun: Future[Any] = beside.submit(value, courier, query, delivery)
        wait_for_lock(conn, courier)
        other.commit()
        assert begun.result()["secrets"] == [secret]


def test_a_role_of_ones_own_is_no_more_than_authenticated(
    conn: psycopg.Connection, database: str, user: UUID, postgres: EmbeddedPostgres
) -> None:
    made = endpoint(conn, user)
    name = str(psycopg.conninfo.conninfo_to_dict(database)["dbname"])
    with psycopg.connect(postgres.url(user=SUPERUSER, database=name)) as admin:
        admin.execute("create role reporting in role authenticated")
        admin.execute("set local session authorization reporting")
        assert value(admin, "select count(*) from webhook_endpoints") == 0
        assert value(admin, "select send_test_webhook(%s)", made) is None
        with pytest.raises(psycopg.errors.CheckViolation, match="is no endpoint of yours"):
            admin.execute("select rotate_webhook_secret(%s)", (made,))
        admin.rollback()


def test_an_owner_deletes_an_endpoint_while_it_says_that_it_is_gone(
    conn: psycopg.Connection, work: Work, user: UUID, other: psycopg.Connection
) -> None:
    endpoint(conn, user)
    tell(work, user)
    delivery = value(conn, "select id from webhook_deliveries")
    conn.execute("set lock_timeout = '4s'")
    other.execute("select from webhook_deliveries for update")
    conn.execute("delete from webhook_endpoints")
    assert value(conn, FORGET) == 0, "for the next time"
    other.execute(
        "select pgscribe.record_delivery(%s, 1, 410, null, 'webhook_gone', 'It is gone.')",
        (delivery,),
    )
    other.commit()
    assert value(conn, FORGET) == 1
    assert value(conn, "select count(*) from webhook_deliveries") == 0


def test_an_endpoint_goes_at_once_and_its_deliveries_by_and_by(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    """In one statement, some hundred thousands would take longer than users may take."""
    going, staying = endpoint(conn, user), endpoint(conn, user)
    tell(work, user)
    conn.execute(
        "with added as ("
        " insert into webhook_deliveries (user_id, endpoint_id, event, payload, queue_job_id)"
        " select %s, %s, 'webhook.test', '{}',"
        "        nextval('procrastinate.procrastinate_jobs_id_seq')"
        "   from generate_series(1, 2500) returning id, queue_job_id)"
        "insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, args)"
        " select queue_job_id, 'webhooks', 'deliver_webhook', jsonb_build_object('delivery_id', id)"
        "   from added",
        (user, going),
    )
    conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user,))
    some = value(conn, "select id from webhook_deliveries where endpoint_id = %s limit 1", going)
    conn.execute(
        "select pgscribe.record_delivery(id, 1, 500, null, 'webhook_failed', 'x')"
        " from webhook_deliveries"
    )
    assert value(conn, "select count(*) from webhook_attempts") == 2502
    conn.execute(
        "select set_config('role', 'authenticated', false),"
        " set_config('request.jwt.claims', %s, false)",
        (json.dumps({"sub": str(user)}),),
    )
    conn.execute("delete from webhook_endpoints where id = %s", (going,))
    seen = conn.execute("select endpoint_id from webhook_deliveries").fetchall()
    assert seen == [(staying,)], "nobody sees the others any more"
    assert value(conn, "select count(*) from webhook_attempts") == 1
    assert value(conn, "select count(*) from operator_deliveries('queued')") == 1
    assert value(conn, "select replay_webhook_delivery(%s)", some) is None
    conn.execute("reset role")
    assert value(conn, "select count(*) from webhook_deliveries") == 2502
    assert value(conn, "select pgscribe.begin_delivery(%s)", some) is None
    conn.execute("select pgscribe.add_up_usage()")  # as workers do once a minute
    left = conn.execute("select endpoint_id from webhook_deliveries").fetchall()
    assert left == [(staying,)]
    assert value(conn, QUEUE_JOBS) == 1
    assert value(conn, "select count(*) from pgscribe.deleted_endpoints") == 0


def test_deliveries_that_somebody_has_locked_hold_up_no_other_endpoints(
    conn: psycopg.Connection, work: Work, user: UUID, make_user: MakeUser,
    other: psycopg.Connection,
) -> None:  # fmt: skip
    for owner in (user, make_user()):
        endpoint(conn, owner)
        tell(work, owner)
        conn.execute("delete from webhook_endpoints")
    other.execute("select from webhook_deliveries where user_id = %s for update", (user,))
    assert value(conn, FORGET) == 1
    assert conn.execute("select user_id from webhook_deliveries").fetchall() == [(user,)]
    other.commit()
    assert value(conn, FORGET) == 1
    assert value(conn, "select count(*) from pgscribe.deleted_endpoints") == 0


def test_an_endpoint_made_anew_with_its_id_keeps_its_deliveries(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    """As whoever has a secret key may make it, who restores what was deleted."""
    made = endpoint(conn, user)
    for _ in range(2):
        conn.execute("delete from webhook_endpoints")
        conn.execute("set role service_role")
        conn.execute(
            "insert into webhook_endpoints (id, user_id, url) values (%s, %s, 'https://a.org')",
            (made, user),
        )
        conn.execute("reset role")
        tell(work, user)
    assert value(conn, FORGET) == 0
    assert value(conn, "select count(*) from webhook_deliveries") == 2
    assert value(conn, "select count(*) from pgscribe.deleted_endpoints") == 0


def test_nobodys_retry_waits_while_deliveries_are_deleted(
    conn: psycopg.Connection, database: str, work: Work, user: UUID,
    other: psycopg.Connection, beside: ThreadPoolExecutor,
) -> None:  # fmt: skip
    endpoint(conn, user)
    tell(work, user)
    conn.execute("delete from webhook_endpoints")
    other.execute("select from procrastinate.procrastinate_jobs for update")  # it waits for that
    with psycopg.connect(database, autocommit=True) as worker:
        added = beside.submit(worker.execute, b"select pgscribe.add_up_usage()")
        wait_for_lock(conn, worker)
        lock = "select pg_try_advisory_xact_lock_shared(hashtextextended('pgscribe days', 0))"
        free = value(conn, lock)
        other.commit()
        added.result()
    assert free
    assert value(conn, "select count(*) from webhook_deliveries") == 0


@pytest.mark.parametrize("first", ["the user goes", "the job ends"])
def test_a_user_is_deleted_while_a_job_of_theirs_ends(
    conn: psycopg.Connection, database: str, work: Work, user: UUID, first: str,
    other: psycopg.Connection, beside: ThreadPoolExecutor,
) -> None:  # fmt: skip
    """A foreign key would have the job's end wait for the user, and the user for the job."""
    endpoint(conn, user)
    work.insert(user)
    worker = value(conn, REGISTER)
    (job,) = value(conn, TURN.format("jobs"), worker, None, 1)
    ended = [{"queue_job_id": job["queue_job_id"], "job_id": job["id"], "attempt": 1}]
    ended[0] |= {"outcome": "succeeded", "result": {}}
    turn, delete = TURN.format("busy"), b"delete from auth.users where id = %s"
    conn.execute("set lock_timeout = '4s'")
    if first == "the user goes":
        # What deleting does first; then it goes for the jobs.
        other.execute("select from auth.users where id = %s for update", (user,))
        assert value(conn, turn, worker, json.dumps(ended), 0) == [UUID(job["id"])]
        other.execute(delete, (user,))
        other.commit()
        assert value(conn, turn, worker, json.dumps(ended), 0) is None
    else:
        value(other, turn, worker, json.dumps(ended), 0)
        with psycopg.connect(database, autocommit=True) as admin:
            deleted = beside.submit(admin.execute, delete, (user,))
            wait_for_lock(conn, admin)
            other.commit()
            deleted.result()
    assert value(conn, "select count(*) from processing_jobs") == 0
    assert value(conn, "select count(*) from webhook_deliveries") == 0
    assert value(conn, QUEUE_JOBS) == 0


def test_users_are_deleted_while_their_jobs_end(
    conn: psycopg.Connection, database: str, work: Work, make_user: MakeUser,
    beside: ThreadPoolExecutor,
) -> None:  # fmt: skip
    users = [make_user() for _ in range(30)]
    for user in users:
        endpoint(conn, user)
        work.insert(user)
    worker = value(conn, REGISTER)
    jobs = value(conn, TURN.format("jobs"), worker, None, 30)
    assert len(jobs) == 30

    def end_all() -> None:
        with psycopg.connect(database, autocommit=True) as own:
            for job in jobs:
                ended = {"queue_job_id": job["queue_job_id"], "job_id": job["id"], "attempt": 1}
                ended |= {"outcome": "succeeded", "result": {}}
                value(own, TURN.format("busy"), worker, json.dumps([ended]), 0)

    def delete_all() -> None:
        with psycopg.connect(database, autocommit=True) as own:
            for job in jobs:
                own.execute("delete from auth.users where id = %s", (job["user_id"],))

    for one in [beside.submit(end_all), beside.submit(delete_all)]:
        one.result()  # neither was broken off
    assert value(conn, "select count(*) from webhook_deliveries") == 0
    assert value(conn, "select count(*) from processing_jobs") == 0


def test_a_heartbeat_waits_for_no_delivery(
    conn: psycopg.Connection, work: Work, user: UUID, make_user: MakeUser,
    other: psycopg.Connection,
) -> None:  # fmt: skip
    """A claim whose answer never arrived, while somebody has one of its deliveries locked."""
    for owner in (user, make_user()):
        endpoint(conn, owner)
        tell(work, owner)
    worker = value(conn, REGISTER)
    assert value(conn, CLAIM, worker, 2) == 2
    other.execute("select from webhook_deliveries where user_id = %s for update", (user,))
    conn.execute("set lock_timeout = '4s'")
    beat = "select pgscribe.beat(%s, '{}', '{}', '{}', 30, 3, false) -> 'orphans'"
    query = "select user_id = %s, status from webhook_deliveries order by 1"
    assert value(conn, beat, worker) == 1
    assert conn.execute(query, (user,)).fetchall() == [(False, "queued"), (True, "sending")]
    other.commit()
    assert value(conn, beat, worker) == 1
    assert conn.execute(query, (user,)).fetchall() == [(False, "queued"), (True, "queued")]


def test_nobodys_jobs_wait_for_an_endpoint_that_is_being_deleted(
    conn: psycopg.Connection, work: Work, user: UUID, make_user: MakeUser,
    other: psycopg.Connection,
) -> None:  # fmt: skip
    going = endpoint(conn, user)
    neighbour = make_user()
    staying = {endpoint(conn, user), endpoint(conn, neighbour)}
    for owner in (user, neighbour):
        work.insert(owner)
    worker = value(conn, REGISTER)
    jobs = value(conn, TURN.format("jobs"), worker, None, 2)
    other.execute("delete from webhook_endpoints where id = %s", (going,))
    conn.execute("set lock_timeout = '4s'")
    ended = [
        {"queue_job_id": job["queue_job_id"], "job_id": job["id"], "attempt": 1}
        | {"outcome": "succeeded", "result": {}}
        for job in jobs
    ]
    assert len(ended) == 2
    assert value(conn, TURN.format("busy"), worker, json.dumps(ended), 0) is None
    other.commit()
    told = conn.execute("select endpoint_id from webhook_deliveries").fetchall()
    assert {row[0] for row in told} == staying


def test_what_somebody_else_has_locked_ends_later_and_holds_up_nothing_else(
    conn: psycopg.Connection, work: Work, user: UUID, make_user: MakeUser,
    other: psycopg.Connection,
) -> None:  # fmt: skip
    """A job is deleted in a long transaction, which changes its delivery."""
    for owner in (user, make_user()):
        endpoint(conn, owner)
        tell(work, owner)
    worker = value(conn, REGISTER)
    assert value(conn, CLAIM, worker, 2) == 2
    other.execute("delete from processing_jobs where user_id = %s", (user,))
    conn.execute("set lock_timeout = '4s'")
    sent = conn.execute("select queue_job_id, user_id from webhook_deliveries").fetchall()
    ended = [{"queue_job_id": sent_, "attempt": 0, "outcome": "succeeded"} for sent_, _ in sent]
    busy = value(conn, TURN.format("light_busy"), worker, json.dumps(ended), 0)
    assert busy == [queue_job for queue_job, owner in sent if owner == user]
    conn.execute(
        "update procrastinate.procrastinate_jobs set worker_id = null where queue_name = 'webhooks'"
    )
    conn.execute("select pgscribe.sweep_stalled_jobs(0, 3)")
    query = "select user_id = %s, status from webhook_deliveries order by 1"
    assert conn.execute(query, (user,)).fetchall() == [(False, "delivered"), (True, "sending")]
    other.commit()
    conn.execute("select pgscribe.sweep_stalled_jobs(0, 3)")
    assert conn.execute(query, (user,)).fetchall() == [(False, "delivered"), (True, "queued")]


def test_what_somebody_else_has_locked_is_looked_for_again_in_a_second(
    conn: psycopg.Connection, work: Work, user: UUID, other: psycopg.Connection
) -> None:
    endpoint(conn, user)
    tell(work, user)
    query = "select extract(epoch from next_due - now()) from pgscribe.claim_deliveries(null, 5)"
    other.execute("delete from processing_jobs")
    assert value(conn, query) == 1
    other.commit()
    assert value(conn, query) is None
    assert value(conn, SENDING) == 1


def test_what_is_due_and_locked_is_looked_for_again_in_a_second(
    conn: psycopg.Connection, work: Work, user: UUID, other: psycopg.Connection
) -> None:
    endpoint(conn, user)
    tell(work, user)
    conn.execute("update webhook_deliveries set due_at = now() - interval '1 minute'")
    query = "select extract(epoch from next_due - now()) from pgscribe.claim_deliveries(null, 5)"
    other.execute("select from webhook_deliveries for update")
    assert value(conn, query) == 1


def test_owners_take_turns_whatever_their_ids(conn: psycopg.Connection, work: Work) -> None:
    """One slot at a time is free: an id right after another's is as good as any."""
    owners = [UUID(int=1), UUID(int=2), UUID(int=2**127)]
    for owner in owners:
        conn.execute("insert into auth.users (id, email) values (%s, %s)", (owner, str(owner)))
        endpoint(conn, owner)
        tell(work, owner, 4)
    told = "select user_id, id from webhook_deliveries where status = 'sending'"
    served = []
    for _ in range(9):
        assert value(conn, CLAIM, None, 1) == 1
        served.append(value(conn, told))
        conn.execute(
            "update procrastinate.procrastinate_jobs set status = 'succeeded'"
            " where status = 'doing'"
        )
    assert served == owners * 3


def test_whoever_is_late_does_not_undo_what_has_been_taken(
    conn: psycopg.Connection, work: Work, user: UUID
) -> None:
    """A worker that was presumed dead had no answer, and says so after the next one had one."""
    endpoint(conn, user)
    tell(work, user)
    delivery = value(conn, "select id from webhook_deliveries")
    record = "select pgscribe.record_delivery(%s, 1, %s, null, %s, null)"
    conn.execute(record, (delivery, 204, None))
    conn.execute(record, (delivery, None, "webhook_failed"))
    assert value(conn, "select pgscribe.begin_delivery(%s)", delivery) is None


def test_nobody_waits_behind_hundreds_of_owners_who_have_all_they_may_have(
    conn: psycopg.Connection, work: Work
) -> None:
    owners = [UUID(int=number) for number in range(1, 252)]
    conn.execute(
        "insert into auth.users (id, email) select id, id::text from unnest(%s) id", (owners,)
    )
    for owner in owners:
        endpoint(conn, owner)
    conn.execute(
        "update pgscribe.queue_settings set max_running_per_owner = 1 where queue_name = 'webhooks'"
    )
    for owner in owners[:-1]:
        tell(work, owner, 2)
    assert value(conn, CLAIM, None, 250) == 200
    assert value(conn, CLAIM, None, 250) == 50
    tell(work, owners[-1], 1)
    query = "select cardinality(jobs), next_due - now() from pgscribe.claim_deliveries(null, 1)"
    looks = [conn.execute(query).fetchone() for _ in range(2)]
    assert 1 in [look[0] for look in looks if look]
