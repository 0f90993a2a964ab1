"""Uploading as a user sees it: choosing and dropping files, options, bad connections, refusals."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from playwright.sync_api import Dialog, FilePayload, Locator, Page, expect

from tests.browser.conftest import ARGUMENTS, Site, complaints, sign_in
from tests.folders import files_in
from tests.live import FaultyProxy, answer, proxied, serve
from tests.streams import until
from web.app import create_app

MIB = 1024**2
CHUNK = 6 * MIB
SOME_SECONDS = re.compile(r"^0:(0[2-9]|[1-5]\d)$")  # two at least; who looks each may miss one
User = tuple[UUID, str]


def small(name: str, content: bytes = b"sound") -> FilePayload:
    return {"name": name, "mimeType": "audio/mpeg", "buffer": content}


def row(page: Page, name: str) -> Locator:
    return page.locator("li.job").filter(has=page.get_by_role("link", name=name, exact=True))


def upload(page: Page, name: str) -> Locator:
    return page.locator("li.upload", has_text=name)


def jobs(site: Site, user: User) -> list[tuple[str, dict[str, Any]]]:
    """Return the user's jobs, oldest first: path and options."""
    return site.conn.execute(
        "select file_path, options from processing_jobs where user_id = %s order by created_at, id",
        (user[0],),
    ).fetchall()


def stored(site: Site, user: User) -> str:
    """Return the digest of the recording of the user's only job."""
    ((path, _),) = jobs(site, user)
    return hashlib.sha256((site.settings.storage_dir / path).read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file that goes in three chunks, and its digest."""
    path = tmp_path_factory.mktemp("large") / "large.mp3"
    path.write_bytes(content := os.urandom(2 * CHUNK + MIB))
    return path, hashlib.sha256(content).hexdigest()


@contextmanager
def behind_proxy(site: Site, user: User) -> Iterator[tuple[Page, FaultyProxy]]:
    """Yield the list of jobs, as it is by a connection that loses what it is told to."""
    with proxied(site.url) as proxy:
        behind = replace(site, url=proxy.url, contexts=[])
        page = behind.open()
        sign_in(page, user[1])
        expect(page.locator("#live.connected")).to_be_visible()  # it asks for nothing by itself now
        try:
            yield page, proxy
        finally:
            behind.contexts[0].close()


@contextmanager
def taking_at_most(site: Site, size: int) -> Iterator[Site]:
    """Yield a server that takes smaller uploads only."""
    with serve(create_app(site.settings.model_copy(update={"max_upload_bytes": size}))) as url:
        smaller = replace(site, url=url, contexts=[])
        yield smaller
        for context in smaller.contexts:
            context.close()


def offsets(proxy: FaultyProxy) -> list[int]:
    """Return where the pieces began that were sent."""
    sent = [headers for method, _, headers in proxy.requests if method == "PATCH"]
    return [int(headers["upload-offset"]) for headers in sent]


# Choosing


def test_several_files_are_chosen_at_once(page: Page, site: Site, user: User) -> None:
    names = ["one.mp3", "<img src=x onerror=alert(1)>.mp3", "drei & größer.mp3", "4.mp3", "5.mp3"]
    page.set_input_files("#files", [small(name, name.encode()) for name in names])
    for name in names:
        expect(row(page, name).locator(".status")).to_have_text("Queued")
    expect(page.locator("li.upload")).to_have_count(0)
    expect(page.locator("main img")).to_have_count(0)
    added = jobs(site, user)
    assert sorted(path.rpartition("/")[2] for path, _ in added) == sorted(names)
    for path, _ in added:
        assert (site.settings.storage_dir / path).read_bytes() == path.rpartition("/")[2].encode()


def test_files_are_dropped(page: Page, site: Site, user: User) -> None:
    dropped = page.evaluate_handle(
        """() => {
            const dropped = new DataTransfer();
            dropped.items.add(new File(["a"], "a.mp3", { type: "audio/mpeg" }));
            dropped.items.add(new File(["b"], "b.mp3"));
            return dropped;
        }"""
    )
    page.dispatch_event("main", "dragover", {"dataTransfer": dropped})
    expect(page.locator("#drop")).to_have_class("drop over")
    page.dispatch_event("main", "drop", {"dataTransfer": dropped})
    expect(page.locator("#drop")).to_have_class("drop")
    expect(row(page, "a.mp3")).to_be_visible()
    expect(row(page, "b.mp3")).to_be_visible()
    assert len(jobs(site, user)) == 2
    text = page.evaluate_handle(
        "() => { const some = new DataTransfer(); some.setData('text/plain', 'x'); return some; }"
    )
    page.dispatch_event("main", "dragover", {"dataTransfer": text})
    expect(page.locator("#drop")).to_have_class("drop")


def test_options_are_sent_and_remembered(page: Page, site: Site, user: User) -> None:
    summary = page.locator("#options-summary")
    expect(summary).to_have_text("language detected, base model")
    page.set_input_files("#files", small("plain.mp3"))
    expect(row(page, "plain.mp3")).to_be_visible()
    assert jobs(site, user)[0][1] == {"model": "base", "word_timestamps": True}
    page.locator("summary").click()
    page.get_by_label("Language spoken").select_option("Polish")
    page.get_by_label("Model").select_option("tiny")
    page.get_by_label("Names and words to expect").fill("  pgscribe, <b>Łukasz</b> ")
    page.get_by_label("Times for each word").uncheck()
    page.get_by_label("Translate into English").check()
    page.get_by_label("Level and clean the sound first").check()
    expect(summary).to_have_text("Polish, tiny model, into English")
    page.set_input_files("#files", small("chosen.mp3"))
    expect(row(page, "chosen.mp3")).to_be_visible()
    chosen = {"model": "tiny", "language": "pl", "task": "translate", "preprocessing": True}
    assert jobs(site, user)[1][1] == chosen | {"initial_prompt": "pgscribe, <b>Łukasz</b>"}
    # The names are of one recording, the rest is of whoever uploads.
    page.reload()
    expect(summary).to_have_text("Polish, tiny model, into English")
    page.locator("summary").click()
    expect(page.get_by_label("Names and words to expect")).to_have_value("")
    page.set_input_files("#files", small("again.mp3"))
    expect(row(page, "again.mp3")).to_be_visible()
    assert jobs(site, user)[2][1] == chosen


def test_what_is_kept_of_options_may_be_nonsense(page: Page, site: Site, user: User) -> None:
    for kept in ("{", '{"model": "none", "language": "xx", "x": 1}', "null", "[1]"):
        page.evaluate("kept => localStorage.setItem('pgscribe.options', kept)", kept)
        page.reload()
        expect(page.locator("#options-summary")).to_have_text("language detected, base model")
    page.set_input_files("#files", small("plain.mp3"))
    expect(row(page, "plain.mp3")).to_be_visible()
    assert jobs(site, user)[0][1] == {"model": "base", "word_timestamps": True}


# Bad connections


def test_a_large_file_goes_on_where_the_connection_broke(
    page: Page, site: Site, user: User, large: tuple[Path, str]
) -> None:
    pieces: list[int] = []

    def note(request: Any) -> None:
        if request.method == "PATCH":
            pieces.append(int(request.headers["upload-offset"]))

    page.on("request", note)
    network = page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1}
    network.send("Network.enable")
    network.send("Network.emulateNetworkConditions", slow | {"uploadThroughput": 2 * MIB})
    page.set_input_files("#files", large[0])
    one = upload(page, "large.mp3")
    bar = one.get_by_role("progressbar", name="Upload of large.mp3").element_handle()
    page.wait_for_function("bar => bar.value > 0.2", arg=bar)  # looks at each frame
    assert re.search(r" \d\d % of 14 MB", one.inner_text())
    assert bar.evaluate("bar => bar.value") < 1
    gone = slow | {"offline": True, "uploadThroughput": -1}
    network.send("Network.emulateNetworkConditions", gone)
    expect(one).to_contain_text("Waiting for a connection")
    network.send("Network.emulateNetworkConditions", slow | {"uploadThroughput": -1})
    expect(row(page, "large.mp3")).to_be_visible()
    assert stored(site, user) == large[1]
    assert pieces[0] == 0
    assert pieces[1] > 0, "it did not begin anew"
    complaints.clear()  # of the connection


def test_servers_that_stumble_and_answers_that_get_lost_are_no_end(
    site: Site, user: User, large: tuple[Path, str]
) -> None:
    with behind_proxy(site, user) as (page, proxy):
        proxy.faults = [
            ("PATCH", answer(503)), ("PATCH", "half"), ("PATCH", "answer"), ("PATCH", "request")
        ]  # fmt: skip
        page.set_input_files("#files", large[0])
        expect(upload(page, "large.mp3")).to_contain_text("Interrupted, trying again")
        expect(row(page, "large.mp3")).to_be_visible()
        first, again, middle, *rest = offsets(proxy)
        assert (first, again) == (0, 0)
        assert 0 < middle < CHUNK, "what had arrived of the piece stays"
        assert rest == [middle + CHUNK, middle + CHUNK]
        assert stored(site, user) == large[1]
        assert page.evaluate("() => Object.keys(localStorage)") == []
    assert {re.sub(r".*(503|ERR_\w+).*", r"\1", said) for said in complaints} <= {
        "503", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET", "ERR_CONNECTION_CLOSED"
    }  # fmt: skip
    complaints.clear()


def test_a_small_file_is_stored_once_whatever_gets_lost(site: Site, user: User) -> None:
    with behind_proxy(site, user) as (page, proxy):
        proxy.faults = [("PUT", answer(503)), ("PUT", "answer")]
        page.set_input_files("#files", small("small.mp3"))
        expect(row(page, "small.mp3")).to_be_visible()
        assert proxy.seen("PUT") == 3
        assert stored(site, user) == hashlib.sha256(b"sound").hexdigest()
    complaints.clear()  # 503, a lost answer, 409


def test_a_lost_answer_to_the_job_makes_no_second_one(site: Site, user: User) -> None:
    with behind_proxy(site, user) as (page, proxy):
        proxy.faults = [("POST", None), ("POST", "answer")]
        page.set_input_files("#files", small("small.mp3"))
        one = upload(page, "small.mp3")
        expect(one.get_by_role("alert")).to_contain_text("The server can't be reached")
        one.get_by_role("button", name="Try again").focus()
        page.keyboard.press("Enter")
        expect(one).to_have_count(0)
        expect(row(page, "small.mp3")).to_have_count(1)
        expect(page.locator("#files")).to_be_focused()
        assert proxy.seen("PUT") == 1
    assert len(jobs(site, user)) == 1
    complaints.clear()


def test_the_same_file_chosen_again_after_a_reload_goes_on(
    site: Site, user: User, large: tuple[Path, str]
) -> None:
    with behind_proxy(site, user) as (page, proxy):
        proxy.faults = [("PATCH", None), ("PATCH", "wait")]
        page.set_input_files("#files", large[0])
        expect(upload(page, "large.mp3")).to_contain_text(re.compile(r"(4[6-9]|[5-9]\d) % of"))
        until(lambda: proxy.seen("PATCH") == 2, "the second piece is on its way")
        page.reload()
        expect(page.locator("li.upload")).to_have_count(0)
        before = len(proxy.requests)
        page.set_input_files("#files", large[0])
        expect(row(page, "large.mp3")).to_be_visible()
        after = [(method, path) for method, path, _ in proxy.requests[before:]]
        assert ("POST", "/uploads") not in after
        assert offsets(proxy) == [0, CHUNK, CHUNK, 2 * CHUNK]
        assert stored(site, user) == large[1]


def test_who_has_to_sign_in_meanwhile_need_not_send_it_again(
    site: Site, user: User, large: tuple[Path, str]
) -> None:
    with behind_proxy(site, user) as (page, proxy):
        page.on("dialog", lambda dialog: dialog.accept())
        proxy.faults = [("PATCH", None), ("PATCH", None), ("PATCH", "answer")]
        with page.expect_request(lambda request: request.method == "PATCH"):
            page.set_input_files("#files", large[0])
        site.conn.execute("delete from pgscribe.web_sessions where user_id = %s", (user[0],))
        page.wait_for_url("**/app/sign-in?next=%2Fapp")
        sent = proxy.seen("PATCH")
        sign_in(page, user[1])
        page.set_input_files("#files", large[0])
        expect(row(page, "large.mp3")).to_be_visible()
        assert proxy.seen("PATCH") == sent
        assert stored(site, user) == large[1]
    complaints.clear()


def test_a_file_that_changes_after_it_was_chosen_is_said_to_have(
    page: Page, tmp_path: Path
) -> None:
    path = tmp_path / "changes.mp3"
    path.write_bytes(b"before")

    def change(route: Any) -> None:
        path.write_bytes(b"after, and longer")
        os.utime(path, (1, 1))
        route.continue_()

    page.route("**/uploads", change)
    page.set_input_files("#files", path)
    one = upload(page, "changes.mp3")
    expect(one.get_by_role("alert")).to_contain_text("“changes.mp3” can't be read: it was moved")
    expect(one.get_by_role("button")).to_have_text(["Remove"])
    assert all("ERR_" in said for said in complaints)
    complaints.clear()


# Breaking off


def test_a_cancelled_upload_leaves_nothing(site: Site, user: User, large: tuple[Path, str]) -> None:
    with behind_proxy(site, user) as (page, proxy):
        proxy.faults = [("PATCH", None), ("PATCH", "wait")]
        page.set_input_files("#files", large[0])
        until(lambda: proxy.seen("PATCH") == 2, "the second piece is on its way")
        page.get_by_role("button", name="Cancel large.mp3").focus()
        page.keyboard.press("Space")
        expect(page.locator("li.upload")).to_have_count(0)
        expect(page.locator("#files")).to_be_focused()
        until(lambda: proxy.seen("DELETE") == 1, "the server may forget it")
        kept = site.settings.storage_dir / ".partial"
        until(lambda: not files_in(kept), "it has")
        assert page.evaluate("() => Object.keys(localStorage)") == []
    assert jobs(site, user) == []


def test_who_leaves_while_something_is_uploaded_is_asked(
    site: Site, user: User, large: tuple[Path, str]
) -> None:
    with behind_proxy(site, user) as (page, proxy):
        asked: list[str] = []

        def stay(dialog: Dialog) -> None:
            asked.append(dialog.type)
            dialog.dismiss()

        page.on("dialog", stay)
        page.locator("#new-title").click()
        proxy.faults = [("PATCH", None), ("PATCH", "wait")]
        page.set_input_files("#files", large[0])
        until(lambda: proxy.seen("PATCH") == 2, "the second piece is on its way")
        with page.expect_event("dialog"):
            page.close(run_before_unload=True)
        expect(upload(page, "large.mp3")).to_be_visible()
        assert asked == ["beforeunload"]
        page.get_by_role("button", name="Cancel large.mp3").click()
        expect(page.locator("li.upload")).to_have_count(0)
        page.get_by_role("link", name="API").click()
        page.wait_for_url("**/docs")
        assert asked == ["beforeunload"]


def test_two_tabs_upload_the_same_file_without_getting_into_each_others_way(
    site: Site, user: User, large: tuple[Path, str]
) -> None:
    with behind_proxy(site, user) as (one, proxy):
        other = one.context.new_page()
        other.goto("/app")
        proxy.faults = [("PATCH", None), ("PATCH", "wait")]
        one.set_input_files("#files", large[0])
        until(lambda: proxy.seen("PATCH") == 2, "the first tab's second piece is on its way")
        other.set_input_files("#files", large[0])
        expect(row(other, "large.mp3")).to_be_visible()
        expect(row(one, "large.mp3")).to_be_visible()
        expect(upload(one, "large.mp3")).to_be_visible()
        assert offsets(proxy) == [0, CHUNK, 0, CHUNK, 2 * CHUNK]
        # What the first has begun is still known, for when it has to begin again.
        (kept,) = one.evaluate("() => Object.keys(localStorage)")
        assert kept.startswith("pgscribe.upload ")
        upload(one, "large.mp3").get_by_role("button", name="Cancel").click()
    assert stored(site, user) == large[1]


def test_who_signs_out_leaves_no_links_to_uploads_behind(
    site: Site, user: User, large: tuple[Path, str]
) -> None:
    with behind_proxy(site, user) as (page, proxy):
        page.on("dialog", lambda dialog: dialog.accept())
        proxy.faults = [("PATCH", None), ("PATCH", "wait")]
        page.set_input_files("#files", large[0])
        until(lambda: proxy.seen("PATCH") == 2, "the second piece is on its way")
        kept = "() => Object.keys(localStorage).filter((key) => key.startsWith('pgscribe.upload '))"
        assert len(page.evaluate(kept)) == 1
        page.get_by_role("button", name="Sign out").click()
        expect(page).to_have_title("Sign in · pgscribe")
        assert page.evaluate(kept) == []


def test_a_recording_is_discarded_and_the_microphone_let_go(
    page: Page, site: Site, user: User
) -> None:
    page.get_by_role("button", name="Record").click()
    expect(page.get_by_role("button", name="Transcribe it")).to_be_focused()
    expect(page.locator("#recorded")).to_have_text(SOME_SECONDS)
    page.get_by_role("button", name="Discard").click()
    expect(page.get_by_role("button", name="Record")).to_be_focused()
    expect(page.locator("#recording")).to_be_hidden()
    assert jobs(site, user) == []


def test_who_does_not_allow_the_microphone_is_told_how_to(
    site: Site, user: User, chromium: str
) -> None:
    args = [argument for argument in ARGUMENTS if "fake-ui" not in argument]  # which allows it
    launch = site.browser.browser_type.launch
    with launch(executable_path=chromium, args=args) as browser:
        page = replace(site, browser=browser, contexts=[]).open()
        sign_in(page, user[1])
        browser.new_browser_cdp_session().send(
            "Browser.setPermission",
            {"permission": {"name": "microphone"}, "setting": "denied", "origin": site.url},
        )
        page.get_by_role("button", name="Record").click()
        expect(page.locator(".toast")).to_contain_text("Allow it for this site in the address bar")
        expect(page.get_by_role("button", name="Record")).to_be_enabled()
        expect(page.locator("#recording")).to_be_hidden()


def test_what_was_said_before_the_microphone_was_unplugged_is_kept(
    page: Page, site: Site, user: User
) -> None:
    page.evaluate(
        """() => {
          const devices = navigator.mediaDevices;
          const ask = devices.getUserMedia.bind(devices);
          devices.getUserMedia = async (wanted) => (window.microphone = await ask(wanted));
        }"""
    )
    page.get_by_role("button", name="Record").click()
    expect(page.locator("#recorded")).to_have_text(SOME_SECONDS)
    page.evaluate("() => window.microphone.getTracks().forEach((track) => track.stop())")
    page.wait_for_timeout(300)  # the recorder hears of it
    page.get_by_role("button", name="Transcribe it").click()
    until(lambda: jobs(site, user), "there is a job")
    ((path, _),) = jobs(site, user)
    assert (site.settings.storage_dir / path).stat().st_size > 1000


# Refusals


def test_an_empty_file_is_refused_before_it_is_sent(page: Page, site: Site, user: User) -> None:
    page.set_input_files("#files", [small("empty.mp3", b""), small("fine.mp3")])
    one = upload(page, "empty.mp3")
    expect(one.get_by_role("alert")).to_contain_text("This file is empty.")
    expect(row(page, "fine.mp3")).to_be_visible()
    expect(one.get_by_role("button")).to_have_text(["Remove"])
    one.get_by_role("button", name="Remove empty.mp3").click()
    expect(page.locator("li.upload")).to_have_count(0)
    assert len(jobs(site, user)) == 1


def test_a_file_that_is_too_large_is_refused_with_the_limit_and_a_way_out(
    site: Site, user: User
) -> None:
    with taking_at_most(site, 2000) as smaller:
        page = smaller.open()
        sign_in(page, user[1])
        page.set_input_files("#files", small("much.wav", bytes(3100)))
        one = upload(page, "much.wav")
        expect(one.get_by_role("alert")).to_have_text(
            "It has 3.1 kB, and at most 2 kB are taken. "
            "A compressed form, such as MP3 or M4A, is much smaller."
        )
        expect(one.get_by_role("button")).to_have_text(["Remove"])
    assert len(complaints) == 1
    assert "413" in complaints.pop()


def test_who_has_reached_a_limit_is_told_and_goes_on_without_uploading_again(
    page: Page, site: Site, user: User
) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.method))
    site.conn.execute("select limit_owner(%s, max_queued => 0)", (user[0],))
    page.set_input_files("#files", small("talk.mp3"))
    one = upload(page, "talk.mp3")
    said = one.get_by_role("alert")
    expect(said).to_have_text(
        "The limit of 0 jobs that wait is reached. "
        "Wait until some have started, cancel some, or ask for a higher limit."
    )
    with page.expect_response("**/process"):
        one.get_by_role("button", name="Try again").click()
    expect(said).to_be_visible()
    site.conn.execute("select limit_owner(%s)", (user[0],))
    one.get_by_role("button", name="Try again").click()
    expect(row(page, "talk.mp3")).to_be_visible()
    assert sent.count("PUT") == 1
    assert len(complaints) == 2
    assert all("429" in complaint for complaint in complaints)
    complaints.clear()
