"""The list of jobs as a user sees it: live, filtered, searched, and what can be done to a job."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from playwright.sync_api import FilePayload, Locator, Page, Request, Route, expect
from psycopg.types.json import Jsonb

from jobs.sql import ATTEMPTS
from tests import ports
from tests.browser.conftest import Site, complaints, sign_in
from tests.live import serve
from tests.streams import Work, until
from web.app import create_app

LIVE = re.compile(r"\bconnected\b")
HTML = "<img src=x onerror=alert(1)> & <i>you.mp3"
PHONE = {"width": 390, "height": 844}
User = tuple[UUID, str]


@pytest.fixture(scope="module")
def work(site: Site) -> Iterator[Work]:
    """Jobs as workers and other programs change them."""
    with Work(site.settings.database_url.get_secret_value()) as driver:
        yield driver


@pytest.fixture
def page(site: Site, user: User) -> Page:
    """The list of jobs, live."""
    return opened(site, user)


def opened(site: Site, user: User, **options: object) -> Page:
    page = site.open(**options)
    sign_in(page, user[1])
    expect(page.locator("#live")).to_have_class(LIVE)
    return page


def row(page: Page, name: str) -> Locator:
    return page.locator("li.job").filter(has=page.get_by_role("link", name=name, exact=True))


def audio(name: str, content: bytes) -> FilePayload:
    return {"name": name, "mimeType": "audio/mpeg", "buffer": content}


def delete(page: Page, name: str) -> None:
    row(page, name).get_by_role("button", name=f"Delete {name}").click()


def ended(work: Work, user: UUID, name: str, status: str = "failed") -> UUID:
    job = work.insert(user, name)
    work.start(job)
    work.set_queue_status(status, job)
    return job


def transcribed(work: Work, user: UUID, name: str, *segments: str) -> UUID:
    job = work.insert(user, name)
    work.start(job)
    parts = [
        {"start": 10.0 * n, "end": 10.0 * n + 9, "text": text} for n, text in enumerate(segments)
    ]
    length = 10 * len(parts)
    result = {"text": " ".join(segments), "language": "en", "segments": parts, "duration": length}
    work.execute(
        "update processing_jobs set result = %s, audio_seconds = %s where id = %s",
        (Jsonb(result), length, job),
    )
    work.set_queue_status("succeeded", job)
    return job


def status(work: Work, job: UUID) -> str | None:
    rows = work.execute("select status from processing_jobs where id = %s", (job,))
    return rows[0][0] if rows else None


def asks(page: Page, method: str) -> list[str]:
    """Return what the page asks for from now on: the paths of those requests."""
    paths: list[str] = []

    def note(request: Request) -> None:
        if request.method == method:
            paths.append(request.url)

    page.on("request", note)
    return paths


# Live


def test_what_other_programs_do_is_seen_at_once(
    page: Page, work: Work, user: User, site: Site
) -> None:
    loads = asks(page, "GET")
    job = work.insert(user[0], HTML)
    expect(row(page, HTML).locator(".status")).to_have_text("Queued")
    expect(page.locator("#jobs img")).to_have_count(0)
    work.start(job)
    expect(row(page, HTML).locator(".status")).to_have_text("Processing")
    work.execute(ATTEMPTS["write_progress"], {"job_id": job, "attempt": 1, "progress": 0.4})
    expect(row(page, HTML).locator(".work")).to_contain_text(re.compile(r"40 % · .+ left"))
    bar = row(page, HTML).get_by_role("progressbar")
    expect(bar).to_have_accessible_name(f"Progress of {HTML}")
    assert bar.evaluate("bar => bar.value") == 0.4
    work.note(job, "<b>almost</b>")
    expect(row(page, HTML).locator(".work")).to_contain_text("<b>almost</b>")
    work.complete(job)
    expect(row(page, HTML).locator(".status")).to_have_text("Completed")
    expect(page.locator("#news")).to_have_text(f"{HTML}: completed")
    work.delete(job)
    expect(row(page, HTML)).to_have_count(0)
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    # Of others there is nothing, and nobody has asked anything meanwhile.
    work.insert(site.new_user()[0], "others.mp3")
    work.insert(user[0], "own.mp3")
    expect(row(page, "own.mp3")).to_be_visible()
    expect(row(page, "others.mp3")).to_have_count(0)
    assert loads == []


def test_a_failure_is_said_and_tried_again(page: Page, work: Work, user: User) -> None:
    job = work.insert(user[0], "talk.mp3")
    work.start(job)
    said = "'talk.mp3' is silent: <b>nobody</b> speaks in it."
    work.execute(
        "update processing_jobs set error_code = 'no_speech', error = %s where id = %s", (said, job)
    )
    work.set_queue_status("failed", job)
    expect(row(page, "talk.mp3").locator(".problem")).to_have_text(said)
    row(page, "talk.mp3").get_by_role("button", name="Retry").click()
    expect(row(page, "talk.mp3").locator(".status")).to_have_text("Queued")
    expect(page.get_by_role("status").filter(has_text="is queued again")).to_be_visible()
    assert status(work, job) == "queued"


def test_a_job_is_cancelled_and_when_others_try_it_again_it_is_not_cancelled_any_more(
    page: Page, work: Work, user: User
) -> None:
    job = work.insert(user[0], "talk.mp3")
    work.start(job)
    talk = row(page, "talk.mp3")
    expect(talk.locator(".status")).to_have_text("Processing")
    tab = page.context.new_page()
    tab.goto(f"/app/jobs/{job}")
    expect(tab.get_by_role("button", name="Cancel")).to_be_visible()
    page.bring_to_front()
    talk.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")
    expect(talk.locator(".status")).to_have_text("Cancelling")
    expect(talk.get_by_role("button", name="Cancel")).to_have_count(0)
    tab.bring_to_front()
    expect(tab.locator("#status")).to_have_text("Cancelling")
    expect(tab.get_by_role("button", name="Cancel")).to_be_hidden()
    tab.close()
    page.bring_to_front()
    work.set_queue_status("aborted", job)
    expect(talk.locator(".status")).to_have_text("Cancelled")
    # The focus is not on what a second press would delete.
    expect(talk.get_by_role("link")).to_be_focused()
    work.execute("update processing_jobs set retry_requested_at = now() where id = %s", (job,))
    expect(talk.locator(".status")).to_have_text("Queued")
    expect(talk.get_by_role("button", name="Cancel")).to_be_visible()


def test_the_time_left_is_by_what_this_attempt_has_done(page: Page) -> None:
    """The one before has done half of it: how fast, nobody knows."""
    left = """async (states) => {
      const list = document.querySelector("script[type=module]").src;
      const { Estimates } = await import(new URL("progress.js", list));
      const estimates = new Estimates();
      return states.map(([attempt, progress, second]) => {
        estimates.note({
          id: "one", status: "processing", attempt, progress, started_at: "2026-01-01T00:00:00Z",
          updated_at: `2026-01-01T00:00:${String(second).padStart(2, "0")}Z`,
        });
        const seconds = estimates.left("one");
        return seconds === null ? null : Math.round(seconds);
      });
    }"""
    first = [[1, 0.01, 1], [1, 0.25, 10], [1, 0.5, 20]]
    second = [[2, 0.5, 30], [2, 0.51, 31], [2, 0.6, 40], [2, 0.7, 50]]
    assert page.evaluate(left, first + second) == [None, 30, 20, None, None, 40, 30]


@contextmanager
def restartable(site: Site) -> Iterator[tuple[Site, int]]:
    """Yield a place for a server that comes and goes on the same port."""
    with ports.reserved() as port:
        moved = replace(site, url=f"http://127.0.0.1:{port}", contexts=[])
        yield moved, port
        for context in moved.contexts:
            context.close()


def test_when_the_server_comes_back_the_list_is_as_it_is_then_and_the_focus_stays(
    site: Site, work: Work, user: User
) -> None:
    work.insert(user[0], "stays.mp3")
    goes = work.insert(user[0], "goes.mp3")
    with restartable(site) as (moved, port):
        with serve(create_app(site.settings), port):
            page = opened(moved, user)
            row(page, "stays.mp3").get_by_role("button").focus()
        expect(page.locator("#live")).not_to_have_class(LIVE)
        work.delete(goes)
        work.insert(user[0], "comes.mp3")
        with serve(create_app(site.settings), port):
            expect(row(page, "comes.mp3")).to_be_visible()
            expect(row(page, "goes.mp3")).to_have_count(0)
            expect(page.locator("#live")).to_have_class(LIVE)
            expect(row(page, "stays.mp3").get_by_role("button")).to_be_focused()
            moved.contexts.pop().close()
    assert all("ERR_" in said for said in complaints)
    complaints.clear()


def test_when_the_database_breaks_the_connection_off_events_still_come(
    page: Page, work: Work, user: User
) -> None:
    ended_ones = work.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name = 'pgscribe events' and datname = current_database()"
    )
    assert ended_ones
    work.insert(user[0], "after.mp3")
    expect(row(page, "after.mp3")).to_be_visible()


def test_a_tab_that_nobody_looks_at_lets_go_of_the_stream(
    site: Site, work: Work, user: User
) -> None:
    page = site.open()
    page.clock.install()
    sign_in(page, user[1])
    expect(page.locator("#live")).to_have_class(LIVE)
    page.clock.pause_at(datetime.now(UTC) + timedelta(minutes=1))  # only what is run passes
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, True)  # noqa: FBT003
    page.clock.run_for(19_000)
    expect(page.locator("#live")).to_have_class(LIVE)
    page.clock.run_for(2_000)
    expect(page.locator("#live")).not_to_have_class(LIVE)
    page.clock.resume()
    work.insert(user[0], "meanwhile.mp3")
    page.evaluate(hide, False)  # noqa: FBT003
    expect(page.locator("#live")).to_have_class(LIVE)
    expect(row(page, "meanwhile.mp3")).to_be_visible()


# Finding


def test_what_ends_before_the_stream_begins_is_shown_as_it_is(
    site: Site, work: Work, user: User
) -> None:
    job = work.insert(user[0], "long ago.mp3")
    work.start(job)
    page = site.open()
    sign_in(page, user[1], "/app/nowhere")  # a page without a list
    complaints.clear()  # as there is no such page
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    page.route("**/jobs/events", hold)
    with page.expect_request("**/jobs/events"):
        page.goto("/app")
    expect(row(page, "long ago.mp3").locator(".status")).to_have_text("Processing")
    work.set_queue_status("failed", job)
    held[0].continue_()
    expect(row(page, "long ago.mp3").locator(".status")).to_have_text("Failed")


def test_filters_show_what_is_in_that_state_and_keep_to_it(
    page: Page, work: Work, user: User
) -> None:
    ended(work, user[0], "failed.mp3")
    queued = work.insert(user[0], "queued.mp3")
    expect(page.locator("li.job")).to_have_count(2)
    page.get_by_role("radio", name="All").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name="Queued")).to_be_checked()
    expect(page.locator("li.job .name")).to_have_text(["queued.mp3"])
    work.start(queued)
    expect(page.locator("li.job")).to_have_count(0)
    expect(page.get_by_text("Nothing is queued.")).to_be_visible()
    page.get_by_role("radio", name="Failed").check()
    expect(page.locator("li.job .name")).to_have_text(["failed.mp3"])
    page.set_input_files("#files", audio("new.mp3", b"x"))
    expect(page.get_by_role("status").filter(has_text="new.mp3 is queued")).to_be_visible()
    expect(page.locator("li.job .name")).to_have_text(["failed.mp3"])
    page.reload()
    expect(page.get_by_role("radio", name="Failed")).to_be_checked()
    expect(page.locator("li.job .name")).to_have_text(["failed.mp3"])
    page.get_by_role("radio", name="All").check()
    expect(page.locator("li.job")).to_have_count(3)


def test_a_search_finds_marks_and_leads_to_where_it_was_said(
    page: Page, work: Work, user: User
) -> None:
    said = [
        "A quiet night.",
        "The <b>old</b> lighthouse & its keepers.",
        "Then the lighthouse fell.",
    ]
    job = transcribed(work, user[0], "story.mp3", *said)
    transcribed(work, user[0], "other.mp3", "Nothing of that.")
    expect(page.locator("li.job")).to_have_count(2)
    page.get_by_role("radio", name="Queued").check()
    expect(page.get_by_text("Nothing is queued.")).to_be_visible()
    page.get_by_role("searchbox").fill("lighthouse")
    expect(page.locator("#news")).to_have_text("Found in 1 transcript")
    expect(page.locator("li.job .name")).to_have_text(["story.mp3"])
    expect(page.get_by_role("radio", name="All")).to_be_checked()
    expect(page.locator("li.job time")).to_have_text("just now")
    hits = row(page, "story.mp3").locator(".hits a")
    expect(hits).to_have_count(2)
    expect(hits.first).to_contain_text("0:10 The <b>old</b> lighthouse & its keepers.")
    expect(hits.locator("mark")).to_have_text(["lighthouse", "lighthouse"])
    # What is new does not come between the results.
    work.insert(user[0], "new.mp3")
    hits.nth(1).click()
    page.wait_for_url(f"/app/jobs/{job}?t=20")
    expect(page.locator(".segment.current")).to_contain_text("fell")
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("lighthouse")
    expect(hits).to_have_count(2)
    page.get_by_role("searchbox").fill("no such words")
    expect(page.get_by_text("No transcript has “no such words”.")).to_be_visible()
    page.get_by_role("searchbox").fill("")
    expect(page.locator("li.job")).to_have_count(3)
    assert all("audio" in said or "404" in said for said in complaints)  # there is no recording
    complaints.clear()


def test_older_ones_come_when_asked_for_and_stay(site: Site, work: Work, user: User) -> None:
    work.execute(
        "insert into processing_jobs (user_id, file_path, created_at)"
        " select %s, 'a/talk ' || n || '.mp3', now() - n * interval '1 minute'"
        " from generate_series(1, 120) n",
        (user[0],),
    )
    page = opened(site, user)
    names = [f"talk {n}.mp3" for n in range(1, 121)]
    expect(page.locator("li.job .name")).to_have_text(names[:50])
    page.get_by_role("button", name="Show older ones").focus()
    page.keyboard.press("Enter")
    expect(page.locator("li.job .name")).to_have_text(names[:100])
    expect(row(page, "talk 51.mp3").get_by_role("link")).to_be_focused()
    page.get_by_role("button", name="Show older ones").click()
    expect(page.locator("li.job .name")).to_have_text(names)
    expect(page.get_by_role("button", name="Show older ones")).to_be_hidden()
    # The stream says that something may have been missed: all that is shown is asked for again.
    forgotten = json.dumps({"owner": str(user[0]), "jobs": None})
    with page.expect_response(re.compile("/jobs.*cursor=")):
        work.execute("delete from processing_jobs where file_path = 'a/talk 70.mp3'")
        work.execute("select pg_notify('pgscribe_events', %s)", (forgotten,))
    expect(page.locator("li.job .name")).to_have_text([n for n in names if n != "talk 70.mp3"])


# Deleting


def test_who_undoes_deletes_nothing(page: Page, work: Work, user: User) -> None:
    deletes = asks(page, "DELETE")
    for name in ("one.mp3", "two.mp3", "three.mp3"):
        ended(work, user[0], name)
    expect(page.locator("li.job .name")).to_have_text(["three.mp3", "two.mp3", "one.mp3"])
    row(page, "two.mp3").get_by_role("button", name="Delete").focus()
    page.keyboard.press("Space")
    expect(row(page, "two.mp3")).to_have_count(0)
    undo = page.get_by_role("button", name="Undo")
    expect(undo).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("li.job .name")).to_have_text(["three.mp3", "two.mp3", "one.mp3"])
    expect(row(page, "two.mp3").get_by_role("link")).to_be_focused()
    expect(undo).to_have_count(0)
    # In the results of a search as well.
    job = transcribed(work, user[0], "story.mp3", "The lighthouse stood.")
    page.get_by_role("searchbox").fill("lighthouse")
    expect(page.locator(".hits")).to_have_count(1)
    delete(page, "story.mp3")
    undo.hover()  # so that it stays
    expect(page.get_by_text("No transcript has “lighthouse”.")).to_be_visible()
    page.get_by_role("searchbox").fill("lighthouse stood")
    expect(page.locator("#news")).to_have_text("Nothing found")
    undo.click()
    expect(row(page, "story.mp3").locator(".hits")).to_be_visible()
    page.goto("/app")
    expect(page.locator("li.job")).to_have_count(4)
    assert status(work, job) == "completed"
    assert deletes == []


def test_what_is_deleted_goes_with_its_recording(site: Site, work: Work, user: User) -> None:
    page = site.open()
    page.clock.install()
    sign_in(page, user[1])
    job = ended(work, user[0], "talk.mp3")
    delete(page, "talk.mp3")
    toast = page.get_by_text("Deleted talk.mp3 and its recording")
    expect(toast).to_be_visible()
    expect(page.locator("#jobs-title")).to_be_focused()
    # While somebody is about to press the button, it stays.
    page.get_by_role("button", name="Undo").focus()
    page.clock.run_for(20_000)
    assert status(work, job) == "failed"
    page.locator("#jobs-title").focus()
    page.clock.run_for(8_000)
    expect(toast).to_have_count(0)
    until(lambda: status(work, job) is None, "it is deleted")
    left = work.execute(
        "select count(*) from pgscribe.audio_to_delete where file_path = %s",
        (f"{user[0]}/talk.mp3",),
    )
    assert left == [(1,)]


def test_who_deletes_and_leaves_has_deleted(page: Page, work: Work, user: User) -> None:
    gone = ended(work, user[0], "talk.mp3")
    work.insert(user[0], "other.mp3")
    delete(page, "talk.mp3")
    expect(row(page, "talk.mp3")).to_have_count(0)
    row(page, "other.mp3").get_by_role("link").click()
    until(lambda: status(work, gone) is None, "it is deleted")
    again = ended(work, user[0], "again.mp3")
    page.go_back()
    delete(page, "again.mp3")
    expect(row(page, "again.mp3")).to_have_count(0)
    page.close()
    until(lambda: status(work, again) is None, "it is deleted")


def test_who_deletes_and_signs_out_has_deleted(page: Page, work: Work, user: User) -> None:
    job = ended(work, user[0], "private.mp3")
    delete(page, "private.mp3")
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    assert status(work, job) == "failed"
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/app/sign-in*")
    assert status(work, job) is None


def test_what_others_have_deleted_does_not_come_back(page: Page, work: Work, user: User) -> None:
    job = ended(work, user[0], "talk.mp3")
    ended(work, user[0], "other.mp3")
    delete(page, "talk.mp3")
    page.get_by_role("button", name="Undo").hover()  # so that it stays
    expect(row(page, "talk.mp3")).to_have_count(0)
    work.delete(job)
    deleted = ended(work, user[0], "after.mp3")
    expect(row(page, "after.mp3")).to_be_visible()  # so the page has heard of it
    page.get_by_role("button", name="Undo").click()
    work.delete(deleted)
    expect(page.locator("li.job .name")).to_have_text(["other.mp3"])


def test_a_job_that_can_not_be_deleted_comes_back(site: Site, work: Work, user: User) -> None:
    page = site.open()
    page.clock.install()
    sign_in(page, user[1])
    ended(work, user[0], "talk.mp3")
    delete(page, "talk.mp3")
    page.context.set_offline(offline=True)
    page.clock.run_for(8_000)
    expect(
        page.get_by_text("talk.mp3 was not deleted. The server can't be reached")
    ).to_be_visible()
    expect(row(page, "talk.mp3")).to_be_visible()
    assert all("ERR_INTERNET_DISCONNECTED" in said for said in complaints)
    complaints.clear()


# Keys and fingers


def test_all_is_reached_by_tab(page: Page, work: Work, user: User) -> None:
    ended(work, user[0], "talk.mp3")
    work.insert(user[0], "waits.mp3")
    expect(page.locator("li.job")).to_have_count(2)
    expect(row(page, "talk.mp3").locator(".status")).to_have_text("Failed")
    reached: list[str] = []
    name = """() => {
        const { activeElement: at } = document;
        return at.ariaLabel ?? at.labels?.[0]?.innerText ?? at.innerText;
    }"""
    page.keyboard.press("Tab")
    while (found := str(page.evaluate(name)).split("\n")[0].strip()) not in reached:
        reached.append(found)
        assert page.evaluate(
            "() => getComputedStyle(document.activeElement).outlineStyle !== 'none'"
            " || document.activeElement.matches('#files, .segmented input')"
        ), f"{found}: nothing shows that it has the focus"
        if found.startswith("Options"):
            page.keyboard.press("Enter")
        page.keyboard.press("Tab")
    assert reached[:6] == [
        "Skip to content", "pgscribe", "Transcripts", "Webhooks", "API", "Sign out",
    ]  # fmt: skip
    rest = [
        "Choose files", "Record", "Options language detected, base model", "Language spoken",
        "Model", "Names and words to expect",
        "Times for each word to follow the text while listening",
        "Translate into English", "Level and clean the sound first for quiet or noisy recordings",
        "All", "Search in transcripts", "waits.mp3", "Cancel waits.mp3", "talk.mp3",
        "Retry talk.mp3", "Delete talk.mp3",
    ]  # fmt: skip
    assert reached[6:] == rest
    page.locator("#record").focus()
    page.keyboard.press("Shift+Tab")
    label = page.locator("label[for=files]")
    expect(label).to_have_css("outline-style", "solid")


def test_nothing_is_too_wide_or_too_small_for_a_phone(site: Site, work: Work, user: User) -> None:
    transcribed(work, user[0], "a" * 150 + ".wav", "lighthouse" * 30, "The lighthouse.")
    ended(work, user[0], "interview with Ann and Bo, second part.mp3")
    running = work.insert(user[0], "b" * 100 + ".mp3")
    work.start(running)
    page = opened(site, user, viewport=PHONE, has_touch=True, is_mobile=True)
    expect(page.locator("li.job")).to_have_count(3)
    page.locator("summary").tap()
    page.set_input_files("#files", audio("c" * 120 + ".mp3", b""))
    expect(page.locator(".upload .problem")).to_be_visible()
    assert_fits(page)
    row(page, "interview with Ann and Bo, second part.mp3").get_by_role(
        "button", name="Delete"
    ).tap()
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    assert_fits(page)
    page.get_by_role("searchbox").fill("lighthouse")
    expect(page.locator(".hits")).to_have_count(1)
    assert_fits(page)


def assert_fits(page: Page) -> None:
    """Nothing overflows, and what is to be touched is at least 40 pixels high."""
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    controls = page.locator("button, .button, select, summary, .segmented label, .top nav a")
    low = controls.evaluate_all(
        "all => all.filter((one) => one.checkVisibility() && one.offsetHeight < 40)"
        ".map((one) => one.textContent)"
    )
    assert low == []
    words = page.locator(".segmented span").evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect().height)"
    )
    assert max(words) < 60, "no word is broken"
