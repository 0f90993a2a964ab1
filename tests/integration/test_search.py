"""Owners search their own transcripts, and nobody else's."""

import random
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from jobs import database, service
from jobs.database import Pool, as_user
from jobs.errors import InvalidInput
from jobs.models import SearchResult
from jobs.settings import Settings

pytestmark = pytest.mark.anyio

MakeUser = Callable[[], UUID]


def transcript(*segments: str) -> dict[str, Any]:
    return {
        "text": " ".join(segments),
        "language": "en",
        "segments": [
            {"start": 10.0 * n, "end": 10.0 * n + 9, "text": text}
            for n, text in enumerate(segments)
        ],
    }


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    async with database.make_pool(settings, name="test") as pool:
        yield pool


def complete(conn: psycopg.Connection, user: UUID, result: dict[str, Any]) -> UUID:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'a') returning id, job_id",
        (user,),
    ).fetchone()
    assert row is not None
    step = b"update procrastinate.procrastinate_jobs set status = %s where id = %s"
    conn.execute(step, ("doing", row[1]))
    conn.execute("update processing_jobs set result = %s where id = %s", (Jsonb(result), row[0]))
    conn.execute(step, ("succeeded", row[1]))
    job_id: UUID = row[0]
    return job_id


async def find(pool: Pool, user: UUID, q: str) -> list[SearchResult]:
    async with as_user(pool, {"sub": str(user), "role": "authenticated"}) as conn:
        return (await service.search(conn, q)).results


@pytest.mark.parametrize(
    ("q", "found"),
    [
        ("fox", True),
        ("FOX quick", True),
        ("quick zebra", False),
        ("zebra or fox", True),
        ('"quick brown"', True),
        ('"brown quick"', False),
        ("quick -zebra", True),
        ("quick -fox", False),
        ("jum", True),  # the last word may be a beginning
        ("jum over", False),
        ('"jum"', False),
        ("quick -jum", True),
        ("ju", False),
        ("it's", True),
        ("naïve café", True),
        ("...", False),
        ("' & | ! <-> :* \\", False),
        ("fox' \\", True),
        ("owner", False),
        ("own", False),
    ],
)
async def test_words_phrases_and_exclusions(
    conn: psycopg.Connection, user: UUID, pool: Pool, q: str, *, found: bool
) -> None:
    text = "The quick brown fox jumped over it's naïve café."
    job_id = complete(conn, user, transcript(text))
    assert [result.id for result in await find(pool, user, q)] == [job_id] * found


async def test_nobody_finds_others_transcripts(
    conn: psycopg.Connection, user: UUID, make_user: MakeUser, pool: Pool
) -> None:
    other = make_user()
    complete(conn, other, transcript(f"the secret word of owner {user}"))
    assert await find(pool, user, "secret") == []
    assert await find(pool, user, f'secret "owner {other}" or owner or secret') == []
    assert await find(pool, user, "-nothing") == []
    assert len(await find(pool, other, "secret")) == 1


@pytest.mark.parametrize("role", ["anon", "service_role"])
async def test_no_other_role_searches(conn: psycopg.Connection, role: str) -> None:
    conn.execute("select set_config('role', %s, false)", (role,))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute("select * from search_transcripts('secret')")


async def test_without_a_user_nothing_is_found(conn: psycopg.Connection, user: UUID) -> None:
    complete(conn, user, transcript("secret"))
    with conn.transaction():
        conn.execute("set local role authenticated")
        assert conn.execute("select * from search_transcripts('secret')").fetchall() == []


async def test_only_completed_jobs_are_found(
    conn: psycopg.Connection, user: UUID, pool: Pool
) -> None:
    complete(conn, user, transcript("needle"))
    conn.execute("insert into processing_jobs (user_id, file_path) values (%s, 'needle')", (user,))
    assert len(await find(pool, user, "needle")) == 1
    conn.execute("delete from processing_jobs")
    assert await find(pool, user, "needle") == []


async def test_hits_say_where_and_mark_what(
    conn: psycopg.Connection, user: UUID, pool: Pool
) -> None:
    text = (
        "A \x02needle\x03 & ne",
        "none",
        "Needles, needle! straw",
        "Hay",
        "hay needle",
        "needle",
    )
    complete(conn, user, transcript(*text))
    (result,) = await find(pool, user, "hay needle")
    assert [(hit.start, hit.end, hit.text) for hit in result.hits] == [
        (0, 9, "A \x02needle\x03 & ne"),
        (20, 29, "\x02Needles\x03, \x02needle\x03! straw"),
        (30, 39, "\x02Hay\x03"),
    ]


async def test_hits_are_shown_as_corrected_and_not_where_they_are_left_out(
    conn: psycopg.Connection, user: UUID, pool: Pool
) -> None:
    job_id = complete(conn, user, transcript("A needle.", "secret needle", "Mine: needle.", "Hay."))
    correct = (
        b"insert into transcript_corrections (job_id, segment, text, speaker)"
        b" values (%s, %s, %s, %s) on conflict (job_id, segment) do update set text = excluded.text"
    )
    for segment, text in ((0, None), (1, " \n"), (2, "Meine needles.")):
        conn.execute(correct, (job_id, segment, text, "Anna"))
    (result,) = await find(pool, user, "needle")
    assert [(hit.start, hit.text) for hit in result.hits] == [
        (0, "A \x02needle\x03."),
        (20, "Meine \x02needles\x03."),
    ]
    (result,) = await find(pool, user, "secret")
    assert result.hits == [], "nor is it in the text as a whole"


async def test_a_transcript_without_segments_has_a_place_in_its_text(
    conn: psycopg.Connection, user: UUID, pool: Pool
) -> None:
    complete(conn, user, {"text": "some needle", "segments": None})
    ((hit,),) = [result.hits for result in await find(pool, user, "needle")]
    assert (hit.start, hit.end, hit.text) == (None, None, "some \x02needle\x03")


async def test_the_newest_come_first_page_by_page(
    conn: psycopg.Connection, user: UUID, pool: Pool
) -> None:
    ids = [complete(conn, user, transcript("needle")) for _ in range(5)]
    found: list[UUID] = []
    after = None
    async with as_user(pool, {"sub": str(user), "role": "authenticated"}) as own:
        for expected in (2, 2, 1):
            page = await service.search(own, "needle", limit=2, after=after)
            assert len(page.results) == expected
            found += [result.id for result in page.results]
            after = page.next
    assert after is None
    assert found == ids[::-1]


@pytest.mark.parametrize("q", ["", " ", "x" * 201, "a\0b", "\ud800"])
async def test_what_is_no_query_is_refused(user: UUID, pool: Pool, q: str) -> None:
    with pytest.raises(InvalidInput):
        await find(pool, user, q)


@pytest.mark.parametrize("limit", [0, -1, 102, None])
async def test_the_number_of_results_has_a_limit(
    conn: psycopg.Connection, limit: int | None
) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match=r"^limit: must be from 1 to 100"):
        conn.execute("select * from search_transcripts('a', %s)", (limit,))


def words(seed: int) -> dict[str, str]:
    chance = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789ßäöüéȺⱥİ"
    return {
        "distinct": " ".join(f"{n:x}" for n in range(700_000)),
        "letters": " ".join("".join(chance.choices(letters, k=2)) for _ in range(60_000)),
        "hyphens": " ".join("-".join(chance.choices(letters, k=3)) for _ in range(30_000)),
        "urls": " ".join(f"{n:x}.io/{n:x}" for n in range(100_000)),
        "one": "a " * 600_000,
        "long": "x" * 3_000_000,
        "wide": " ".join(chr(n) + chr(n + 1) for n in range(0x4E00, 0x9F00)) * 3,
        "growing": "Ⱥ " * 50_000 + " ".join("Ⱥ" + chr(n) for n in range(0x400, 0x4FF)),
    }


@pytest.mark.parametrize("kind", words(0))
async def test_no_text_is_too_much_to_complete_a_job(
    conn: psycopg.Connection, user: UUID, pool: Pool, kind: str
) -> None:
    text = words(1)[kind]
    complete(conn, user, {"text": "needle " + text})
    assert len(await find(pool, user, "needle")) == 1
    for size in (32_000, 131_000):
        cut = text.encode()[:size].decode(errors="ignore")
        complete(conn, user, {"text": "needle " + cut})
    assert len(await find(pool, user, "needle")) == 3
