"""The page of webhooks: an owner's endpoints, secrets and log, with a real worker and receiver."""

import json
from collections.abc import Iterator
from uuid import UUID

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.browser.conftest import Site, running_worker, sign_in
from tests.browser.test_operating import answer_dialog
from tests.receiver import Answer, Receiver, receiving


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture(scope="module", autouse=True)
def _worker(site: Site) -> Iterator[None]:
    with running_worker(site, PGSCRIBE_WEBHOOK_NETWORKS="127.0.0.0/8"):
        yield


def webhooks(page: Page) -> None:
    page.goto("/app/webhooks")
    expect(page.locator("#live.connected")).to_be_visible()


def add(page: Page, url: str) -> None:
    page.get_by_text("Add an endpoint").click()
    page.get_by_role("textbox", name="URL").fill(url)
    page.get_by_role("button", name="Add it").click()


def take_secret(page: Page) -> str:
    """Return the secret that is shown, once its owner says that it is stored."""
    expect(page.locator("#secret-title")).to_be_focused()
    secret = page.get_by_role("textbox", name="Secret").input_value()
    page.get_by_role("button", name="I have stored it").click()
    expect(page.locator("#secret")).to_be_hidden()
    expect(page.locator("#secret-value")).to_have_value("")
    return secret


def rows(page: Page) -> Locator:
    return page.locator("#deliveries tr")


def test_from_an_endpoint_to_what_it_was_told(site: Site, page: Page, receiver: Receiver) -> None:
    page.get_by_role("link", name="Webhooks").click()
    expect(page.get_by_role("link", name="Webhooks")).to_have_attribute("aria-current", "page")
    expect(page.locator("#endpoints")).to_have_text("You have none yet.")
    expect(rows(page)).to_have_text(["None."])
    add(page, receiver.url)
    secret = take_secret(page)
    assert secret.startswith("whsec_")
    expect(page.locator("#endpoints .name")).to_have_text([receiver.url])
    other = site.open()
    sign_in(other, site.new_user()[1], "/app/webhooks")
    expect(other.locator("#endpoints")).to_have_text("You have none yet.")
    other.close()
    page.get_by_role("button", name="Send a test").click()
    expect(rows(page).locator(".status")).to_have_text(["Delivered"])
    expect(rows(page)).to_contain_text(f"127.0.0.1:{receiver.port}")
    [request] = receiver.expect(1)
    said = request.verified(secret)
    assert said["type"] == "webhook.test"

    page.get_by_role("button", name="Details of webhook.test").click()
    details = page.get_by_role("dialog")
    expect(details).to_contain_text(request.id)
    expect(details).to_contain_text(receiver.url)
    expect(page.locator("#requests tr td:last-child")).to_have_text(["204"])
    assert json.loads(page.locator("#payload").inner_text()) == said
    details.get_by_role("button", name="Close").click()

    page.get_by_role("button", name="Send again: webhook.test").click()
    assert receiver.expect(2)[1].id == request.id
    page.get_by_role("button", name="New secret").click()
    answer_dialog(page, "Make it", about=receiver.url)
    new = take_secret(page)
    assert new != secret
    page.get_by_role("button", name="Send a test").click()
    last = receiver.expect(3)[2]
    assert last.verified(new) == last.verified(secret)  # for a day, either will do
    expect(rows(page).locator(".status")).to_have_text(["Delivered", "Delivered"])


def test_one_that_is_gone_comes_back(page: Page, receiver: Receiver, complained: list[str]) -> None:
    webhooks(page)
    add(page, receiver.url)
    secret = take_secret(page)
    receiver.default = Answer(410, body=b"<b>gone</b>")
    page.get_by_role("button", name="Send a test").click()
    expect(page.locator("#endpoints .status")).to_have_text("Disabled")
    expect(page.locator("#endpoints .problem")).to_contain_text("410")
    expect(rows(page).locator(".status")).to_have_text(["Not delivered"])
    page.get_by_role("button", name="Details of").click()
    expect(page.locator("#requests pre")).to_have_text("<b>gone</b>")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send again: webhook.test").click()
    expect(page.locator("#deliveries-problem")).to_contain_text("disabled")
    assert "422" in complained.pop()

    receiver.default = Answer()
    page.get_by_role("button", name="Enable").click()
    expect(page.locator("#endpoints .status")).to_have_text("Enabled")
    page.get_by_role("button", name="Send again", exact=True).first.click()
    answer_dialog(page, "Send again", about="last 24 hours")
    expect(page.locator(".toast").last).to_have_text("1 webhook sent again")
    expect(rows(page).locator(".status")).to_have_text(["Delivered"])
    first, second = receiver.expect(2)
    assert first.id == second.id
    assert second.verified(secret)["type"] == "webhook.test"

    page.get_by_role("button", name="Disable").click()
    expect(page.locator("#endpoints .problem")).to_contain_text("by hand")
    page.get_by_role("button", name="Delete").click()
    answer_dialog(page, "Leave it", about=receiver.url)
    expect(page.locator("#endpoints .name")).to_have_text([receiver.url])
    page.get_by_role("button", name="Delete").click()
    answer_dialog(page, "Delete it", about=receiver.url)
    expect(page.locator("#endpoints")).to_have_text("You have none yet.")
    expect(rows(page)).to_have_text(["None."])


def test_what_cannot_be_an_endpoint_is_said_beside_the_form(
    page: Page, complained: list[str]
) -> None:
    webhooks(page)
    for url, about in (
        ("", "Say where"),
        ("ftp://example.org/", "url"),
        ("https://me:secret@example.org/", "url"),
    ):
        add(page, url)
        expect(page.get_by_role("alert")).to_contain_text(about)
        expect(page.get_by_role("textbox", name="URL")).to_be_focused()
        expect(page.get_by_role("textbox", name="URL")).to_have_attribute("aria-invalid", "true")
        page.get_by_text("Add an endpoint").click()
    page.get_by_text("Add an endpoint").click()
    for event in ("completed", "failed", "cancelled"):
        page.get_by_label(event, exact=True).uncheck()
    page.get_by_role("textbox", name="URL").fill("https://example.org/")
    page.get_by_role("button", name="Add it").click()
    expect(page.get_by_role("alert")).to_have_text("Choose at least one event.")
    page.get_by_label("failed", exact=True).check()
    page.get_by_role("textbox", name="Note").fill("for <b>me</b>")
    page.get_by_role("button", name="Add it").click()
    take_secret(page)
    expect(page.locator("#endpoints .about")).to_contain_text("failed")
    expect(page.locator("#endpoints .about")).to_contain_text("for <b>me</b>")
    expect(page.locator("#endpoints .about")).not_to_contain_text("completed")
    assert len(complained) == 2
    assert all("422" in said for said in complained)
    complained.clear()


def test_a_long_log_is_read_page_by_page_and_by_state(
    site: Site, page: Page, user: tuple[UUID, str]
) -> None:
    other = site.new_user()
    for owner, count in ((user[0], 120), (other[0], 1)):
        endpoint = site.conn.execute(
            "insert into webhook_endpoints (user_id, url, disabled_at)"
            " values (%s, 'https://hooks.test/', now()) returning id",
            (owner,),
        ).fetchone()
        assert endpoint is not None
        site.conn.execute(
            "insert into webhook_deliveries"
            " (user_id, endpoint_id, event, payload, status, created_at, completed_at)"
            " select %s, %s, 'job.completed', '{}',"
            " case when n %% 2 = 0 then 'failed' else 'delivered' end,"
            " now() - make_interval(mins => n), now() from generate_series(1, %s) n",
            (owner, endpoint[0], count),
        )
    webhooks(page)
    expect(rows(page)).to_have_count(50)
    more = page.get_by_role("button", name="Show older ones")
    more.click()
    expect(rows(page)).to_have_count(100)
    with page.expect_response(lambda answer: "/webhooks/deliveries" in answer.url):
        pass  # the page asks anew by itself, and what is older stays
    expect(rows(page)).to_have_count(100)
    more.click()
    expect(rows(page)).to_have_count(120)
    expect(more).to_be_hidden()
    page.get_by_role("combobox", name="Status").select_option("failed")
    expect(rows(page)).to_have_count(50)
    more.click()
    expect(rows(page)).to_have_count(60)
    expect(page.locator("#deliveries .status.completed")).to_have_count(0)


def test_the_secret_of_jobs_with_a_url_of_their_own(
    site: Site, page: Page, user: tuple[UUID, str], receiver: Receiver
) -> None:
    webhooks(page)
    page.get_by_role("button", name="Make that secret anew").click()
    answer_dialog(page, "Make it", about="for a day")
    secret = take_secret(page)
    site.conn.execute(
        "insert into processing_jobs (user_id, file_path, webhook_url) values (%s, %s, %s)",
        (user[0], f"{user[0]}/none.mp3", receiver.url),
    )
    [request] = receiver.expect(1)
    assert request.verified(secret)["data"]["error_code"] == "file_not_found"
    expect(rows(page).locator(".status")).to_have_text(["Delivered"])
    page.get_by_role("link", name="Open").click()
    expect(page.locator("#status")).to_have_text("Failed")


def refresh(page: Page) -> None:
    """Have the page ask anew, as it does every few seconds, and wait until it shows the answer."""
    with page.expect_response(lambda answer: "/webhooks/deliveries?" in answer.url) as answered:
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    answered.value.finished()
    page.evaluate("new Promise((shown) => setTimeout(shown))")


def test_what_is_pressed_keeps_the_focus_and_is_pressed_once(
    site: Site, page: Page, receiver: Receiver
) -> None:
    webhooks(page)
    add(page, receiver.url)
    take_secret(page)
    held: list[Route] = []
    page.route("**/test", lambda route: held.append(route))  # noqa: PLW0108 - as Playwright needs
    send = page.get_by_role("button", name="Send a test")
    for _ in range(2):
        send.press("Enter")
        refresh(page)
        expect(send).to_be_focused()
    (request,) = held
    request.continue_()
    expect(rows(page).locator(".status")).to_have_text(["Delivered"])
    expect(send).to_be_focused()

    details = page.get_by_role("button", name="Details of")
    details.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    site.conn.execute("update webhook_deliveries set attempts = 7 where attempts = 1")
    refresh(page)
    expect(rows(page)).to_contain_text("7 times")
    page.keyboard.press("Escape")
    expect(details).to_be_focused()

    page.get_by_role("button", name="Send again: ").press("Enter")
    receiver.expect(2)
    page.get_by_role("button", name="Disable").press("Enter")
    expect(page.locator("#endpoints .status")).to_have_text("Disabled")
    expect(page.get_by_role("button", name="Enable")).to_be_focused()


def test_what_went_wrong_stays_to_be_read_and_a_secret_does_not_stay(
    site: Site, page: Page, user: tuple[UUID, str], complained: list[str]
) -> None:
    webhooks(page)
    add(page, "https://hooks.test/")
    secret = page.get_by_role("textbox", name="Secret")
    expect(secret).not_to_have_value("")
    # The browser may keep the page as it is, and show it again to whoever goes back.
    page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))")
    expect(page.locator("#secret-value")).to_have_value("")
    expect(page.locator("#secret")).to_be_hidden()

    site.conn.execute(
        "insert into webhook_deliveries (user_id, endpoint_id, event, payload, status, created_at,"
        " completed_at) select user_id, id, 'job.completed', '{}', 'failed',"
        " now() - make_interval(mins => n), now() from webhook_endpoints, generate_series(1, 60) n"
        " where user_id = %s",
        (user[0],),
    )
    site.conn.execute("update webhook_endpoints set disabled_at = now(), disabled_reason = 'owner'")
    refresh(page)
    page.get_by_role("button", name="Send again: ").first.click()
    expect(page.get_by_role("alert")).to_contain_text("disabled")
    refresh(page)
    expect(page.get_by_role("alert")).to_contain_text("disabled")
    assert "422" in complained.pop()

    site.conn.execute(
        "with other as (insert into webhook_endpoints (user_id, url)"
        " values (%s, 'https://other.test/') returning *)"
        " insert into webhook_deliveries (user_id, endpoint_id, event, payload, status,"
        " completed_at) select user_id, id, 'job.failed', '{}', 'failed', now() from other",
        (user[0],),
    )
    refresh(page)
    page.get_by_role("button", name="Show older ones").click()
    expect(rows(page)).to_have_count(61)
    page.get_by_role("button", name="Delete https://hooks.test/").click()
    answer_dialog(page, "Delete it", about="hooks.test")
    expect(rows(page)).to_have_count(1)
    expect(rows(page)).to_contain_text("other.test")
