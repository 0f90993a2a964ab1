"""Signing in and out as a user does it, and what of it scripts can get at: nothing."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import pytest
from playwright.sync_api import APIResponse, Locator, Page, Request, Route, expect

from tests.browser.conftest import PASSWORD, Site, complaints, sign_in
from tests.supabase_auth.conftest import COOKIE, running
from tests.supabase_auth.server import Auth, serving
from web import sign_in as sign_in_module

User = tuple[UUID, str]


@pytest.fixture
def job(site: Site, user: User) -> UUID:
    """A job of the user's that waits."""
    row = site.conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'a/private talk.mp3')"
        " returning id",
        (user[0],),
    ).fetchone()
    assert row is not None
    job_id: UUID = row[0]
    return job_id


def end_sessions(site: Site, user: User) -> None:
    ended = site.conn.execute("delete from pgscribe.web_sessions where user_id = %s", (user[0],))
    assert ended.rowcount == 1


def read_all(page: Page, path: str, last: Locator) -> list[str]:
    """Return all that a page is given until ``last`` is there, but for its stream of events."""
    asked: list[Request] = []
    finished: list[Request] = []

    def note_asked(one: Request) -> None:
        asked.append(one)

    def note_finished(one: Request) -> None:
        finished.append(one)

    page.goto("about:blank")
    page.on("request", note_asked)
    page.on("requestfinished", note_finished)
    page.goto(path)
    expect(last).to_be_visible()
    page.remove_listener("request", note_asked)
    page.remove_listener("requestfinished", note_finished)
    # What the page before had asked for may still be reported here.
    answers = [answer for one in finished if one in asked and (answer := one.response())]
    assert len(answers) > 5
    return [answer.text() for answer in answers]


def fill(page: Page, email: str, password: str) -> None:
    page.get_by_label("E-mail address", exact=True).fill(email)
    page.get_by_label("Password", exact=True).fill(password)
    page.keyboard.press("Enter")


def test_a_wrong_password_is_said_and_the_right_one_leads_to_where_one_wanted(
    site: Site, user: User, job: UUID
) -> None:
    page = site.open()
    wanted = f"/app/jobs/{job}?t=1.5&x=%26"
    page.goto(wanted)
    expect(page).to_have_title("Sign in · pgscribe")
    expect(page.get_by_label("E-mail address")).to_be_focused()
    fill(page, user[1], "wrong <b>")
    said = page.get_by_role("alert")
    expect(said).to_be_visible()
    expect(page).to_have_title("Error: Sign in · pgscribe")
    password = page.get_by_label("Password", exact=True)
    expect(password).to_be_focused()
    expect(password).to_have_value("")
    expect(password).to_have_accessible_description(said.inner_text())
    expect(page.get_by_label("E-mail address")).to_have_value(user[1])
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url(wanted)
    expect(page.get_by_role("heading", level=1)).to_have_text("private talk.mp3")
    assert len(complaints) == 1
    assert "422" in complaints.pop()


def test_nothing_that_opens_the_api_is_where_scripts_can_read_it(
    site: Site, user: User, job: UUID
) -> None:
    page = site.open()
    sign_in(page, user[1])
    texts = read_all(page, "/app", page.get_by_text("Live"))
    texts += read_all(page, f"/app/jobs/{job}", page.get_by_role("button", name="Cancel"))
    (cookie,) = page.context.cookies()
    assert cookie["name"] == COOKIE
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Lax", "/")
    assert page.evaluate("() => document.cookie") == ""
    kept = page.evaluate("() => JSON.stringify([{ ...localStorage }, { ...sessionStorage }])")
    databases = page.evaluate("() => indexedDB.databases().then((all) => all.length)")
    assert databases == 0
    for text in [*texts, kept, page.content(), page.url]:
        assert cookie["value"] not in text
        assert "eyJ" not in text, "a token begins so"
        assert "access_token" not in text


def test_signing_out_ends_it(site: Site, user: User, job: UUID) -> None:
    page = site.open()
    sign_in(page, user[1])
    page.get_by_role("link", name="private talk.mp3").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("private talk.mp3")
    (cookie,) = page.context.cookies()
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/app/sign-in")
    assert page.context.cookies() == []
    page.go_back()
    expect(page.get_by_label("Password", exact=True)).to_be_visible()
    assert "private talk" not in page.content()
    assert user[1] not in page.content()
    page.go_back()
    expect(page.get_by_label("Password", exact=True)).to_be_visible()
    assert "private talk" not in page.content()
    assert page.evaluate("() => fetch('/jobs').then((answer) => answer.status)") == 401
    page.context.add_cookies([cookie])  # type: ignore[list-item]
    assert page.evaluate(f"() => fetch('/jobs/{job}').then((answer) => answer.status)") == 401
    # Also of the stream that has ended, where the next page is slow to come.
    assert all("401" in said for said in complaints)
    complaints.clear()


def test_what_signing_out_ends_does_not_overtake_its_answer(
    site: Site, user: User, job: UUID
) -> None:
    page = site.open()
    sign_in(page, user[1], f"/app/jobs/{job}")
    held: list[tuple[Route, APIResponse]] = []
    page.route("**/app/sign-out", lambda route: held.append((route, route.fetch(max_redirects=0))))
    with page.expect_response("**/limits") as refused:  # asked since the stream has ended
        page.get_by_role("button", name="Sign out").click(no_wait_after=True)
    assert refused.value.status == 401
    ((route, answer),) = held
    route.fulfill(response=answer)
    page.wait_for_url("**/app/sign-in")
    complaints.clear()  # 401


def test_signing_out_in_one_tab_ends_the_others(site: Site, user: User, job: UUID) -> None:
    page = site.open()
    sign_in(page, user[1], f"/app/jobs/{job}")
    other = page.context.new_page()
    other.goto("/app")
    other.get_by_role("button", name="Sign out").click()
    other.wait_for_url("**/app/sign-in")
    # Nobody touches it: its stream has ended, and asking why leads here.
    page.wait_for_url(f"**/app/sign-in?next=%2Fapp%2Fjobs%2F{job}")
    assert complaints
    assert all("401" in said for said in complaints)
    complaints.clear()


@pytest.mark.parametrize("where", ["/app", "/app/jobs/{job}?t=2"])
def test_when_a_session_has_ended_one_signs_in_and_is_back(
    site: Site, user: User, job: UUID, where: str
) -> None:
    page = site.open()
    path = where.format(job=job)
    with page.expect_response("**/events"):  # else it might be the stream that is refused
        sign_in(page, user[1], path)
    cancel = page.get_by_role("button", name="Cancel")
    expect(cancel).to_be_visible()
    if where == "/app":  # else it might be the list, which is read again for the stream
        expect(page.get_by_text("Live")).to_be_visible()
    end_sessions(site, user)
    cancel.click()
    page.wait_for_url("**/app/sign-in?next=*")
    fill(page, user[1], PASSWORD)
    page.wait_for_url(path)
    cancel.click()
    expect(page.locator(".status.cancelled")).to_be_visible()
    assert complaints
    assert all("401" in said for said in complaints)
    complaints.clear()


def test_one_who_signs_in_after_another_sees_nothing_of_theirs(
    site: Site, user: User, job: UUID
) -> None:
    page = site.open()
    sign_in(page, user[1])
    expect(page.get_by_role("link", name="private talk.mp3")).to_be_visible()
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/app/sign-in")
    other = site.new_user()
    fill(page, other[1], PASSWORD)
    page.wait_for_url("/app")
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    expect(page.get_by_text(other[1])).to_be_visible()
    page.goto(f"/app/jobs/{job}")
    expect(page.get_by_role("heading", name="Not Found")).to_be_visible()
    assert "private talk" not in page.content()
    assert [said for said in complaints if "404" not in said] == []
    complaints.clear()


def test_sign_in_fits_a_phone(site: Site) -> None:
    page = site.open(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.goto("/app")
    fill(page, "a" * 60 + "@" + "b" * 60 + ".example.org", "w" * 200)
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    heights = page.locator("button, input:not([type=hidden])").evaluate_all(
        "all => all.map((one) => one.getBoundingClientRect().height)"
    )
    assert len(heights) == 3
    assert min(heights) >= 40
    complaints.clear()  # 422


# With Supabase


@pytest.fixture(scope="module")
def auth() -> Iterator[Auth]:
    """A project's Auth."""
    with serving() as running_auth:
        yield running_auth


@pytest.fixture(scope="module")
def project(site: Site, auth: Auth) -> Iterator[Site]:
    """The same site, where users sign in with Supabase."""
    own: dict[str, Any] = {
        "supabase_url": auth.url,
        "supabase_publishable_key": auth.key,
        "local_sign_in_password": None,
    }
    with running(site.settings.model_copy(update=own), auth) as app:
        project = replace(site, url=app.url, contexts=[])
        yield project
        for context in project.contexts:
            context.close()


@pytest.fixture
def member(project: Site, auth: Auth) -> User:
    """A user of the project."""
    user = project.new_user()
    auth.add(*user, password="correct horse")
    return user


def test_a_member_signs_in_with_a_password(project: Site, member: User, auth: Auth) -> None:
    page = project.open()
    page.goto("/app/jobs/x")
    page.get_by_label("E-mail address", exact=True).fill(member[1])
    page.get_by_label("Password", exact=True).fill("wrong")
    page.get_by_role("button", name="Sign in", exact=True).click()
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_label("Password", exact=True)).to_be_focused()
    page.goto("/app")
    fill(page, member[1], "correct horse")
    page.wait_for_url("/app")
    expect(page.get_by_text(member[1])).to_be_visible()
    (session,) = [one for one in auth.sessions.values() if one.user.id == member[0]]
    refresh_token = session.tokens[-1].token
    for text in read_all(page, "/app", page.get_by_text("Live")):
        assert "eyJ" not in text
        assert refresh_token not in text
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/app/sign-in")
    assert not [one for one in auth.sessions.values() if one.user.id == member[0]]
    assert len(complaints) == 1
    assert "422" in complaints.pop()


def test_a_link_by_email_leads_to_where_one_wanted(
    project: Site, member: User, auth: Auth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sign_in_module, "LINK_SECONDS", 0.4)
    job = project.conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'a/talk.mp3') returning id",
        (member[0],),
    ).fetchone()
    assert job is not None
    page = project.open()
    page.goto(f"/app/jobs/{job[0]}?t=3")
    page.get_by_label("E-mail address, to get a link").fill(member[1])
    page.get_by_role("button", name="Send me a link").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Look into your e-mail")
    (mail,) = [one for one in auth.mails if one.to == member[1]]
    query = {"token": mail.token_hash, "type": "magiclink", "redirect_to": mail.redirect_to}
    link = f"{auth.url}/auth/v1/verify?{urlencode(query)}"
    page.goto(link)
    page.wait_for_url(f"{project.url}/app/jobs/{job[0]}?t=3&signed-in=1")
    expect(page.get_by_role("heading", level=1)).to_have_text("talk.mp3")
    expect(page.get_by_role("status").filter(has_text=f"Signed in as {member[1]}.")).to_be_visible()
    assert [cookie["name"] for cookie in page.context.cookies(project.url)] == [COOKIE]
    # It works once, and in no other browser.
    page.goto(link)
    expect(page.get_by_role("alert")).to_contain_text("This link is not valid any more")
    assert all("422" in said for said in complaints)
    complaints.clear()
