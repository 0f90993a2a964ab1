"""The section ``promises`` sees what it counts: each test breaks a promise on purpose."""

from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

from benchmarks import by_hand, door, isolation, owners, paid
from benchmarks.figures import Measurement
from benchmarks.owners import Owner
from benchmarks.postgres import OWNERS


@pytest.fixture
def made(conn: psycopg.Connection, tmp_path: Path) -> list[Owner]:
    conn.execute(
        "insert into auth.users (id, email) select id, id || '@example.org' from unnest(%s::uuid[])"
        " id",
        (OWNERS,),
    )
    return [owners.make(conn, tmp_path, number) for number in range(2)]


def figures(lines: Iterable[Measurement]) -> dict[str, dict[str, float]]:
    return {line.id: {name: values[0] for name, values in line.values.items()} for line in lines}


def test_what_is_written_by_hand_is_seen(conn: psycopg.Connection, made: list[Owner]) -> None:
    found = figures(by_hand.measure(conn, made[0]))
    assert set(found["promises-truth-status-accepted"].values()) == {0}
    assert min(found["promises-truth-status-tried"].values()) > 40
    by_postgres = found["promises-truth-columns-accepted"].pop("postgres")
    assert by_postgres > 40, "the attempts would work, if they were allowed"
    assert set(found["promises-truth-columns-accepted"].values()) == {0}

    conn.execute("drop trigger guard_processing_job on processing_jobs")
    conn.execute("grant update (status, note) on processing_jobs to service_role")
    found = figures(by_hand.measure(conn, made[0]))
    status = found["promises-truth-status-accepted"]
    assert status["postgres"] > status["service_role"] > 0
    assert status["authenticated"] == 0
    assert found["promises-truth-columns-accepted"]["service_role"] == 1


def test_a_status_that_the_queue_does_not_say_is_seen(
    conn: psycopg.Connection, made: list[Owner]
) -> None:
    agreement = by_hand.Agreement()
    agreement.look(conn)
    assert (agreement.rows, agreement.differing) == (10, 0)
    conn.execute("drop trigger guard_processing_job on processing_jobs")
    conn.execute(
        "update processing_jobs set status = 'processing' where id = %s", (made[0].jobs["queued"],)
    )
    agreement.look(conn)
    assert (agreement.rows, agreement.differing) == (20, 1)


def test_rows_that_others_see_are_counted(conn: psycopg.Connection, made: list[Owner]) -> None:
    def ask() -> dict[str, isolation.Found]:
        return isolation.ask_all(
            [*isolation.of_relations(conn, "authenticated"), *isolation.of_functions(conn, made)],
            made,
            operator,
        )

    operator = owners.make_operator(conn)
    before = ask()
    assert {kind: found.foreign for kind, found in before.items()} == {
        "relations": 0,
        "functions": 0,
    }
    assert min(found.answers for found in before.values()) > 30

    conn.execute(
        "create view public.leak as select id from processing_jobs where status = 'queued'"
    )
    conn.execute("grant select on public.leak to authenticated")
    conn.execute(
        "create function public.leak(job uuid) returns text language sql security definer"
        " as 'select file_path from public.processing_jobs where id = job'"
    )
    after = ask()
    assert after["relations"].foreign == 2, "each owner sees the other's"
    assert after["functions"].foreign == 2
    assert after["relations"].asked == before["relations"].asked + 3


def test_rows_and_queue_jobs_that_lack_each_other_are_counted(
    conn: psycopg.Connection, made: list[Owner]
) -> None:
    insert = "insert into processing_jobs (user_id, file_path) values (%s, %s || '/postgres/1')"
    conn.execute(insert, (made[0].id, made[0].id))
    told = [[made[0].jobs["queued"]], ["undone"]]
    found = figures(door.compare(conn, 0, told))
    assert found["promises-door-rows"]["SQL, postgres"] == 1
    assert found["promises-door-undone"] == {"pgscribe": 1}
    broken = ("without-job", "without-row", "gone")
    assert {sum(found[f"promises-door-{name}"].values()) for name in broken} == {0}

    conn.execute("alter table processing_jobs disable trigger defer_processing_jobs")
    conn.execute(insert, (made[0].id, made[0].id))
    conn.execute(
        "insert into procrastinate.procrastinate_jobs (queue_name, task_name, args)"
        " values ('transcription', 'transcribe', '{}')"
    )
    found = figures(door.compare(conn, 0, [*told, [str(uuid4())]]))
    assert found["promises-door-without-job"]["SQL, postgres"] == 1
    assert [sum(found[f"promises-door-{name}"].values()) for name in broken] == [1, 1, 1]


def test_calls_in_the_window_are_told_from_those_that_were_paid_twice() -> None:
    accepted = {"a": 1.0, "b": 2.0, "lost": 2.0, "again": 3.0}
    noted: dict[str, tuple[paid.Work, float]] = {
        "a": (("job", 0), 1.01),
        "b": (("job", 1), 2.02),
        "again": (("job", 1), 3.03),
    }
    counted = paid.counts(paid.Paid(1, 1, accepted, frozenset(accepted)), noted)
    assert counted == {"window": 1, "outside": 1, "window-length": pytest.approx(20)}


def test_both_systems_have_the_same_kills_each_run() -> None:
    plans = [list(paid.kill_plan(paid.Sizes())) for _ in range(2)]
    assert plans[0] == plans[1]
    assert len(plans[0]) == paid.Sizes.kills
    assert {victim for _, victim in plans[0][: paid.Sizes.workers]} == {0, 1, 2}
