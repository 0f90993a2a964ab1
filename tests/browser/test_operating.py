"""The operator's page says what the database says, and does what it is told."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from playwright.sync_api import Locator, Page, Request, Route, expect

from tests.browser.conftest import Site, sign_in
from tests.browser.seed import Seed

USAGE = {"calls": 2, "gpu_seconds": 30, "cpu_seconds": 5, "estimated_cost": 0.25}


@pytest.fixture(autouse=True)
def _empty(site: Site, seed: Seed) -> None:
    """Begin with no jobs, no workers and a queue that runs."""
    for table in (
        "public.webhook_attempts",
        "public.webhook_deliveries",
        "public.webhook_endpoints",
        "public.processing_jobs",
        "procrastinate.procrastinate_jobs",
        "procrastinate.procrastinate_workers",
        "pgscribe.daily_totals",
    ):
        seed.admin.execute(f"delete from {table}".encode())
    site.conn.execute("select resume_queue()")


@pytest.fixture
def anna(site: Site) -> tuple[UUID, str]:
    return site.new_user()


@pytest.fixture
def berta(site: Site) -> tuple[UUID, str]:
    return site.new_user()


@pytest.fixture
def page(site: Site, user: tuple[UUID, str]) -> Page:
    """A page of an operator, who has yet to open the operator's page."""
    site.conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user[0],))
    page = site.open(viewport={"width": 1280, "height": 1000}, timezone_id="UTC")
    sign_in(page, user[1])
    return page


def operate(page: Page) -> None:
    page.goto("/app/operate")
    expect(page.locator("#live.connected")).to_be_visible()


def figure(page: Page, name: str) -> str:
    """Return what stands in a figure, with what stands below."""
    return (
        page.locator(".figure", has=page.get_by_text(name, exact=True)).locator("dd").inner_text()
    )


def count(site: Site, status: str) -> int:
    row = site.conn.execute(
        "select count(*) from processing_jobs where status = %s", (status,)
    ).fetchone()
    assert row is not None
    number: int = row[0]
    return number


def answer_dialog(page: Page, answer: str, *, about: str) -> None:
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(dialog).to_contain_text(about)
    dialog.get_by_role("button", name=answer).click()
    expect(dialog).to_be_hidden()


def test_others_neither_see_the_way_nor_get_there(
    site: Site, user: tuple[UUID, str], complained: list[str]
) -> None:
    page = site.open()
    sign_in(page, user[1])
    expect(page.get_by_role("link", name="Transcripts")).to_be_visible()
    expect(page.get_by_role("link", name="Operate")).to_have_count(0)
    answer = page.goto("/app/operate")
    assert answer is not None
    assert answer.status == 403
    expect(page.get_by_role("heading", level=1)).to_have_text("Forbidden")
    assert "403" in complained.pop()
    site.conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user[0],))
    page.goto("/app")
    page.get_by_role("link", name="Operate").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Operate")
    expect(page.get_by_role("link", name="Operate")).to_have_attribute("aria-current", "page")
    # Who is no longer one sees it at the next question, without a new page.
    site.conn.execute("delete from pgscribe.operators where user_id = %s", (user[0],))
    expect(page.locator("#problem")).to_contain_text("operator")
    expect(page.locator("#live")).to_have_text("Not up to date")
    assert complained
    assert all("403" in said for said in complained)
    page.close()
    complained.clear()


def test_a_site_where_nothing_has_happened(page: Page) -> None:
    operate(page)
    expect(page.locator("#workers")).to_have_text(
        "No worker is running. Start one with pgscribe worker."
    )
    expect(page.locator("#owners")).to_have_text("Nobody has jobs.")
    expect(page.locator("#failures")).to_have_text("Nothing has failed.")
    expect(page.locator("#jobs")).to_have_text("No job matches.")
    for name in ("Queued", "Processing", "Scheduled", "Workers", "Completed", "Failed"):
        assert figure(page, name).startswith("0"), name
    for name in ("Wait", "Run", "Speed"):
        assert figure(page, name).startswith("\u2013"), name
    expect(page.locator("#throughput rect[class]")).to_have_count(0)


def test_what_the_database_says(
    page: Page, seed: Seed, site: Site, anna: tuple[UUID, str], berta: tuple[UUID, str]
) -> None:
    day = (datetime.now(UTC) - timedelta(seconds=600)).date().isoformat()
    for waited, ran, seconds in ((10, 5, 100), (20, 10, 400), (90, 20, 100)):
        seed.job(anna[0], ago=600, waited=waited, ran=ran, seconds=seconds, usage=USAGE)
    seed.job(berta[0], ago=1800, waited=30, ran=40, seconds=200)
    seed.job(berta[0], status="failed", ago=2400, code="timeout")
    seed.job(anna[0], status="failed", ago=900, code="timeout")
    seed.job(anna[0], status="failed", ago=950, code="no_speech")
    seed.job(berta[0], status="cancelled", ago=3000)
    seed.job(berta[0], ago=26 * 3600, seconds=9999)
    seed.job(berta[0], status="queued", ago=120)
    worker = seed.worker()
    dead = seed.worker(silent_for=400)
    seed.job(anna[0], "<i>bold & long.mp3", "processing", ago=160, worker=worker, progress=0.5)
    site.conn.execute("select limit_owner(%s, max_running => 7, weight => 2)", (berta[0],))
    operate(page)
    assert {name: figure(page, name) for name in ("Queued", "Completed", "Failed", "Workers")} == {
        "Queued": "1\noldest 2 min",
        "Completed": "4\n13 min of audio",
        "Failed": "3\n42 %",
        "Workers": "1\n1 silent",
    }
    assert figure(page, "Processing") == "1"
    assert figure(page, "Run") == "15 s\n95 % within 37 s"
    assert figure(page, "Speed") == "12.5\u00d7\nreal time"
    # Charts: each bar in its place, and the same as a table.
    assert bars(page, "throughput", 1) == 4
    assert bars(page, "throughput", 2) == 3
    assert bars(page, "throughput", 3) == 1
    page.locator("#costs summary").click()
    row = page.locator("#costs tbody tr", has_text=day)
    expect(row.locator("td")).to_have_text("$0.75")
    expect(page.locator("#costs svg title", has_text=day)).to_have_text(
        re.compile(rf"{day}:\n\$0.75, 90 GPU-seconds, 15 CPU-seconds")
    )
    expect(page.locator("#workers tr", has_text="Alive")).to_contain_text(
        re.compile(rf"^{worker}.*<i>bold & long.mp3, 50 % {anna[1]}, since 3 minutes ago$")
    )
    expect(page.locator("#workers tr", has_text="Silent")).to_have_text(
        re.compile(rf"^{dead}Silent\d+ minutes agonothing$")
    )
    of_anna, of_berta = (page.locator("#owners tr", has_text=one[1]) for one in (anna, berta))
    assert cells(of_anna) == [
        "0", "1", "0 s", "10 min", "75 %", "1", "100",
    ]  # fmt: skip
    assert cells(of_berta) == [
        "1", "0", "60 s", "3 min", "25 %", "2", "7",
    ]  # fmt: skip
    assert page.locator("#failures tr").all_inner_texts() == [
        "timeout\t2\t15 minutes ago\ttimeout 900 seconds ago\tJobs",
        "no_speech\t1\t16 minutes ago\tno_speech 950 seconds ago\tJobs",
    ]


def cells(row: Locator) -> list[str]:
    return [text.strip() for text in row.locator("td").all_inner_texts()[1:8]]


def bars(page: Page, chart: str, series: int) -> int:
    """Return how many jobs the bars of a series stand for, by their heights."""
    return int(
        page.locator(f"#{chart}").evaluate(
            """(place, series) => {
              const lines = [...place.querySelectorAll("line.grid")]
                .map((line) => line.y1.baseVal.value);
              const most = Number(place.querySelectorAll("svg > text")[2].textContent);
              const one = (lines[0] - lines[2]) / most;
              return [...place.querySelectorAll(`rect.series-${series}`)]
                .reduce((sum, bar) => sum + Math.round(bar.height.baseVal.value / one), 0);
            }""",
            series,
        )
    )


def test_another_period(page: Page, seed: Seed, anna: tuple[UUID, str]) -> None:
    for hours in (0.5, 5, 100, 500):
        seed.job(anna[0], ago=hours * 3600, seconds=60)
    operate(page)
    for period, expected in (("1", "1"), ("24", "2"), ("168", "3"), ("720", "4")):
        page.get_by_label("Period").select_option(period)
        dd = page.locator(".figure", has_text="Completed").locator("dd")
        expect(dd).to_have_text(re.compile(f"^{expected} "))
        buckets = page.locator("#throughput svg g").count()
        assert 24 <= buckets <= 61


def test_it_keeps_itself_up_to_date(page: Page, seed: Seed, anna: tuple[UUID, str]) -> None:
    operate(page)
    assert figure(page, "Queued") == "0"
    page.locator("#throughput summary").click()
    seed.job(anna[0], status="queued", ago=1)
    seed.job(anna[0], ago=1)
    expect(page.locator(".figure", has_text="Queued").locator("dd")).to_contain_text("1 oldest")
    expect(page.locator("#owners")).to_contain_text(anna[1])
    # What somebody has opened stays open, and what has the focus keeps it.
    expect(page.locator("#throughput table")).to_be_visible()
    button = page.get_by_role("button", name=f"Pause {anna[1]}")
    button.focus()
    seed.job(anna[0], status="queued", ago=1)
    row = page.locator("#owners tr", has_text=anna[1])
    expect(row.locator("td").nth(1)).to_have_text("2")
    expect(button).to_be_focused()


def test_the_newest_question_is_answered(page: Page, seed: Seed, anna: tuple[UUID, str]) -> None:
    seed.job(anna[0], ago=1800)
    seed.job(anna[0], ago=7200)
    operate(page)
    held: list[Route] = []
    page.route("**/operate/overview?hours=168", lambda route: held.append(route))  # noqa: PLW0108
    page.get_by_label("Period").select_option("168")
    page.get_by_label("Period").select_option("1")
    completed = page.locator(".figure", has_text="Completed").locator("dd")
    expect(completed).to_have_text(re.compile("^1 "))
    with page.expect_response(lambda response: "hours=168" in response.url):
        held[0].continue_()
    page.unroute_all()
    with page.expect_response(lambda response: "hours=1" in response.url):
        pass
    expect(completed).to_have_text(re.compile("^1 "))


def test_pausing_and_resuming_the_queue(page: Page, site: Site) -> None:
    operate(page)
    pause = page.get_by_role("button", name="Pause the queue")
    pause.click()
    answer_dialog(page, "Leave it", about="Running jobs go on")
    pause.click()
    expect(page.get_by_role("button", name="Leave it")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(pause).to_be_focused()
    expect(page.locator("#paused")).to_be_hidden()
    pause.click()
    answer_dialog(page, "Pause", about="No job starts until you resume it")
    expect(page.locator("#paused")).to_contain_text("no job starts, running ones go on")
    expect(page.locator(".toast")).to_contain_text("The queue is paused")
    assert queue_is_paused(site)
    page.reload()
    expect(page.locator("#paused")).to_be_visible()
    page.get_by_role("button", name="Resume the queue").click()
    expect(page.locator("#paused")).to_be_hidden()
    assert not queue_is_paused(site)
    # Somebody else pauses it.
    site.conn.execute("select pause_queue()")
    expect(page.locator("#paused")).to_be_visible()


def queue_is_paused(site: Site) -> bool:
    row = site.conn.execute(
        "select paused_at is not null from pgscribe.queue_settings"
        " where queue_name = 'transcription'"
    ).fetchone()
    return row is not None and bool(row[0])


def test_pausing_an_owner(page: Page, seed: Seed, site: Site, anna: tuple[UUID, str]) -> None:
    seed.job(anna[0], status="queued")
    operate(page)
    row = page.locator("#owners tr", has_text=anna[1])
    row.get_by_role("button", name="Pause").press("Enter")
    expect(row.locator(".status")).to_have_text("Paused")
    expect(row.get_by_role("button", name="Resume")).to_be_focused()
    found = site.conn.execute(
        "select count(*) from pgscribe.owner_limits where owner_id = %s and paused_at is not null",
        (anna[0],),
    ).fetchone()
    assert found == (1,)
    row.get_by_role("button", name="Resume").press("Enter")
    expect(row.locator(".status")).to_have_count(0)
    expect(row.get_by_role("button", name="Pause")).to_be_focused()


def test_everybodys_jobs_by_status_owner_and_error(
    page: Page,
    seed: Seed,
    anna: tuple[UUID, str],
    berta: tuple[UUID, str],
    complained: list[str],
) -> None:
    seed.job(anna[0], "one.mp3", "failed", ago=10, code="timeout", usage=USAGE, seconds=65, ran=12)
    seed.job(anna[0], "two.mp3", "failed", ago=20, code="no_speech")
    seed.job(berta[0], "three.mp3", "failed", ago=30, code="timeout")
    seed.job(berta[0], "four.mp3", "queued", ago=40)
    seed.job(berta[0], "five.mp3", "completed", ago=50)
    operate(page)
    jobs = page.locator("#jobs tr")
    expect(jobs).to_have_count(5)
    first = jobs.filter(has_text="one.mp3").locator("td").all_inner_texts()
    assert first[1:] == [
        "one.mp3", anna[1], "failed", "1:05", "just now", "12 s", "$0.25",
        "timeout timeout 10 seconds ago",
    ]  # fmt: skip

    def names() -> list[str]:
        return page.locator("#jobs tr td:nth-child(2)").all_inner_texts()

    form = page.locator("#filter")
    form.get_by_label("Status").select_option("failed")
    expect(jobs).to_have_count(3)
    form.get_by_label("Error code").fill(" timeout ")
    form.get_by_role("button", name="Show").click()
    expect(jobs).to_have_count(2)
    assert sorted(names()) == ["one.mp3", "three.mp3"]
    form.get_by_label("Owner").fill(str(berta[0]))
    page.keyboard.press("Enter")
    expect(jobs).to_have_count(1)
    assert names() == ["three.mp3"]
    form.get_by_role("button", name="Clear").click()
    expect(jobs).to_have_count(5)
    # From where one sees that something is wrong.
    page.get_by_role("button", name="Jobs with no_speech").click()
    expect(jobs).to_have_count(1)
    assert names() == ["two.mp3"]
    page.get_by_role("button", name=f"Jobs of {berta[1]}").click()
    expect(jobs).to_have_count(3)
    expect(form.get_by_label("Status")).to_have_value("")
    # What can't be is said, and what was shown stays.
    form.get_by_label("Owner").fill("nobody")
    page.keyboard.press("Enter")
    expect(page.locator("#jobs-problem")).to_contain_text("owner")
    expect(jobs).to_have_count(3)
    assert "422" in complained.pop()
    form.get_by_role("button", name="Clear").click()
    expect(page.locator("#jobs-problem")).to_be_hidden()
    expect(jobs).to_have_count(5)


def test_more_than_a_page_of_jobs(page: Page, seed: Seed, anna: tuple[UUID, str]) -> None:
    for number in range(60):
        seed.job(
            anna[0],
            f"{number}.mp3",
            "cancelled" if number % 10 else "failed",
            ago=number,
            code="timeout",
        )
    operate(page)
    jobs = page.locator("#jobs tr")
    expect(jobs).to_have_count(50)
    everything = page.get_by_label("Choose all that are shown")
    everything.check()
    expect(page.locator("#chosen")).to_have_text("50 jobs chosen")
    # What is typed, but not asked for, is not what "older ones" are of.
    page.get_by_label("Error code").fill("no_speech")
    page.get_by_role("button", name="Show older ones").click()
    expect(jobs).to_have_count(60)
    expect(page.get_by_role("button", name="Show older ones")).to_be_hidden()
    expect(everything).not_to_be_checked()
    assert everything.evaluate("box => box.indeterminate")
    everything.check()
    expect(page.locator("#chosen")).to_have_text("60 jobs chosen")
    jobs.filter(has_text="59.mp3").get_by_role("checkbox").uncheck()
    expect(page.locator("#chosen")).to_have_text("59 jobs chosen")
    expect(everything).not_to_be_checked()


def test_cancelling_and_retrying_some(
    page: Page, seed: Seed, site: Site, anna: tuple[UUID, str]
) -> None:
    for number in range(3):
        seed.job(anna[0], f"waits {number}.mp3", "queued", ago=number)
    seed.job(anna[0], "done.mp3", "completed", ago=60)
    operate(page)
    cancel = page.get_by_role("button", name="Cancel", exact=True)
    retry = page.get_by_role("button", name="Retry", exact=True)
    expect(cancel).to_be_disabled()
    expect(retry).to_be_disabled()
    for name in ("waits 0.mp3", "waits 2.mp3", "done.mp3"):
        page.get_by_label(f"Choose {name}").check()
    expect(page.locator("#chosen")).to_have_text("3 jobs chosen")
    cancel.click()
    expect(page.locator(".toast")).to_have_text("2 jobs cancelled; 1 could not be, by their status")
    expect(page.locator("#jobs .status.cancelled")).to_have_count(2)
    expect(page.locator("#chosen")).to_have_text("None chosen")
    assert (count(site, "cancelled"), count(site, "queued")) == (2, 1)
    page.get_by_label("Choose waits 0.mp3").check()
    retry.click()
    expect(page.locator(".toast").last).to_have_text("1 job queued again")
    assert (count(site, "cancelled"), count(site, "queued")) == (1, 2)
    # An owner who may have no more of them.
    site.conn.execute("select limit_owner(%s, max_queued => 2)", (anna[0],))
    page.get_by_label("Choose waits 2.mp3").check()
    retry.click()
    expect(page.locator(".toast").last).to_have_text(
        "0 jobs queued again; 1 would be more than their owners may have"
    )
    assert count(site, "queued") == 2


def test_all_that_match(
    page: Page, seed: Seed, site: Site, anna: tuple[UUID, str], berta: tuple[UUID, str]
) -> None:
    with seed.admin.pipeline():
        for number in range(1101):
            seed.job(anna[0], f"{number}.mp3", "failed", ago=60 + number, code="timeout")
    seed.job(berta[0], "other.mp3", "failed", ago=30, code="no_speech")
    site.conn.execute("select limit_owner(%s, max_queued => 5000)", (anna[0],))
    operate(page)
    retry = page.get_by_role("button", name="Retry all that match")
    retry.click()
    expect(page.locator(".toast")).to_contain_text("Say above which jobs")
    assert count(site, "queued") == 0
    page.get_by_label("Error code").fill("timeout")
    retry.click()
    expect(page.locator("#jobs")).not_to_contain_text("other.mp3")
    answer_dialog(page, "Leave it", about="Matching: error code timeout.")
    assert count(site, "queued") == 0
    sent: list[Any] = []

    def note(request: Request) -> None:
        if request.url.endswith("/operate/jobs/retry"):
            sent.append(request.post_data_json)

    page.on("request", note)
    retry.click()
    answer_dialog(page, "Retry them", about="what they cost is paid again")
    expect(page.locator(".toast").last).to_have_text("1,101 jobs queued again")
    # What fails again meanwhile has ended after the first answer, and is not asked for once more.
    began = {request.get("ended_before") for request in sent[1:]}
    assert len(sent) > 1
    assert "ended_before" not in sent[0]
    assert len(began) == 1
    assert None not in began
    assert (count(site, "queued"), count(site, "failed")) == (1101, 1)
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Status").select_option("queued")
    page.get_by_role("button", name="Cancel all that match").click()
    answer_dialog(page, "Cancel them", about="Matching: status queued.")
    expect(page.locator(".toast").last).to_have_text("1,101 jobs cancelled")
    assert (count(site, "queued"), count(site, "cancelled")) == (0, 1101)


def told(site: Site, owner: UUID, count: int, error: str | None = None) -> None:
    """Have jobs of an owner's end; with an ``error``, nobody could be told."""
    for number in range(count):
        site.conn.execute(
            "insert into processing_jobs (user_id, file_path) values (%s, %s)",
            (owner, f"{owner}/{number}.mp3"),
        )
    site.conn.execute("update processing_jobs set cancel_requested_at = now()")
    if error is not None:
        site.conn.execute(
            "select pgscribe.record_delivery(id, 0.5, 500, 'no', 'webhook_failed', %s)"
            " from webhook_deliveries where status = 'queued'",
            (error,),
        )
        site.conn.execute(
            "update procrastinate.procrastinate_jobs set status = 'failed'"
            " where queue_name = 'webhooks' and status = 'todo'"
        )


def test_webhooks_that_have_failed_are_seen_and_sent_again(
    page: Page, site: Site, anna: tuple[UUID, str], berta: tuple[UUID, str]
) -> None:
    for owner in (anna, berta):
        site.conn.execute(
            "insert into webhook_endpoints (user_id, url) values (%s, 'https://hooks.test/x?key=1')",
            (owner[0],),
        )
    told(site, anna[0], 52, "it answered with <b>HTTP</b> 500")
    told(site, berta[0], 1)
    operate(page)
    assert figure(page, "To be sent").startswith("1\noldest")
    assert figure(page, "Not delivered") == "52"
    deliveries = page.locator("#deliveries tr")
    expect(deliveries).to_have_count(50)
    expect(deliveries.first).to_contain_text("job.cancelled")
    expect(deliveries.first).to_contain_text("hooks.test")
    expect(deliveries.first).to_contain_text(anna[1])
    expect(deliveries.first).to_contain_text("1 attempt")
    expect(deliveries.first).to_contain_text("it answered with <b>HTTP</b> 500")
    expect(page.locator("#deliveries")).not_to_contain_text("key=1")
    page.get_by_role("button", name="Show older webhooks").click()
    expect(deliveries).to_have_count(52)
    expect(page.get_by_role("button", name="Show older webhooks")).to_be_hidden()
    again = page.get_by_role("button", name="Send again")
    expect(again).to_be_disabled()
    for number in (0, 51):
        deliveries.nth(number).get_by_role("checkbox").check()
    expect(page.locator("#chosen-deliveries")).to_have_text("2 chosen")
    again.click()
    expect(page.locator(".toast").last).to_have_text("2 webhooks sent again")
    shown = page.locator("#webhook-figures .figure")
    expect(shown.filter(has_text="Not delivered").locator("dd")).to_have_text(re.compile("^50"))
    expect(shown.filter(has_text="To be sent").locator("dd")).to_have_text(re.compile("^3"))
    page.get_by_label("Deliveries", exact=True).select_option("queued")
    expect(deliveries).to_have_count(3)
    # What its owner has disabled is not sent.
    page.get_by_label("Deliveries", exact=True).select_option("failed")
    expect(deliveries).to_have_count(50)
    site.conn.execute("update webhook_endpoints set disabled_at = now()")
    page.get_by_label("Choose all webhooks that are shown").check()
    expect(page.locator("#chosen-deliveries")).to_have_text("50 chosen")
    again.click()
    expect(page.locator(".toast").last).to_contain_text("0 webhooks sent again; 50")


def test_what_is_refused_is_said(
    page: Page, seed: Seed, site: Site, user: tuple[UUID, str], anna: tuple[UUID, str],
    complained: list[str],
) -> None:  # fmt: skip
    seed.job(anna[0], "waits.mp3", "queued")
    operate(page)
    page.get_by_label("Choose waits.mp3").check()
    site.conn.execute("delete from pgscribe.operators where user_id = %s", (user[0],))
    page.get_by_role("button", name="Cancel", exact=True).click()
    expect(page.locator(".toast").last).to_contain_text("operator")
    expect(page.locator("#jobs-problem")).to_contain_text("operator")
    assert count(site, "queued") == 1
    page.get_by_role("button", name="Pause the queue").click()
    answer_dialog(page, "Pause", about="No job starts")
    expect(page.locator(".toast").last).to_contain_text("operator")
    assert not queue_is_paused(site)
    page.close()
    assert all("403" in said for said in complained)
    complained.clear()
