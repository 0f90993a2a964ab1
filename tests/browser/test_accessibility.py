"""Every page by axe-core's rules, by keyboard alone, enlarged, without motion, without colours."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.conftest import Site, sign_in
from tests.browser.seed import Seed, segment

axe = Axe()

DESKTOP, PHONE = (1280, 900), (390, 844)
WIDTHS = (320, 640)  # the second is 1280 at 200 %
SEGMENTS = [
    segment("The old lighthouse stood.", 0, 4, "The", "old", "lighthouse", "stood."),
    segment("Perhaps nobody spoke.", 4, 8, flags=["no_speech", "low_confidence"]),
    segment("Donaudampfschifffahrtsgesellschaftskapitänsmützenabzeichen" * 3, 8, 12),
    segment("And so on.", 12, 16, "And", "so", "on."),
]


@pytest.fixture(scope="module")
def ann(site: Site) -> tuple[UUID, str]:
    """An operator with jobs in all states."""
    user = site.new_user()
    site.conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user[0],))
    return user


@pytest.fixture(scope="module")
def jobs(site: Site, seed: Seed, ann: tuple[UUID, str]) -> dict[str, UUID]:
    owner = ann[0]
    worker = seed.worker()
    seed.worker(silent_for=400)
    made = {
        "completed": seed.transcript(owner, SEGMENTS, "talk.wav", usage={"estimated_cost": 0.5}),
        "failed": seed.job(owner, "a.mp3", "failed", code="no_speech", seconds=12),
        "cancelled": seed.job(owner, "b.mp3", "cancelled"),
        "queued": seed.job(owner, "c.mp3", "queued"),
        "processing": seed.job(
            owner, "long name without a space ".replace(" ", "_") * 7 + ".mp3", "processing",
            worker=worker, progress=0.5, seconds=40,
        ),
    }  # fmt: skip
    seed.chunks(made["processing"], "What is there so far.", "")
    seed.peaks(made["completed"], [number % 200 for number in range(500)])
    site.conn.execute(
        "insert into webhook_endpoints (user_id, url, description, disabled_at) values"
        " (%(owner)s, 'https://hooks.test/pgscribe', 'A note', null),"
        " (%(owner)s, 'https://hooks.test/' || repeat('long', 50), null, now())",
        {"owner": owner},
    )
    site.conn.execute("select limit_owner(%s, weight => 2)", (owner,))
    site.conn.execute(
        "insert into transcript_corrections (job_id, segment, text, speaker)"
        " values (%s, 0, null, 'Ann'), (%s, 3, 'And so forth.', 'Bo')",
        (made["completed"], made["completed"]),
    )
    return made


def as_ann(site: Site, ann: tuple[UUID, str], **options: Any) -> Page:
    page = site.open(**options)
    sign_in(page, ann[1])
    return page


# What pages there are, each opened as far as it is to be looked at --------------------------------


def wrong_password(page: Page) -> None:
    page.goto("/app/sign-in")
    page.get_by_label("E-mail address").fill("ann@example.org")
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert")).to_be_visible()


def show_list(page: Page) -> None:
    page.goto("/app")
    expect(page.locator("#live.connected")).to_be_visible()
    expect(page.locator("#jobs")).to_have_attribute("aria-busy", "false")


def show_options(page: Page) -> None:
    show_list(page)
    page.get_by_text("Options").click()
    expect(page.get_by_label("Language spoken")).to_be_visible()


def show_uploading(page: Page) -> None:
    show_list(page)
    slow = {"offline": False, "latency": 600_000, "uploadThroughput": -1, "downloadThroughput": -1}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    page.set_input_files("#files", Path(__file__).parents[2] / "examples" / "sample.mp3")
    expect(page.locator("#uploads .upload")).to_be_visible()


def show_completed(page: Page) -> None:
    expect(page.locator(".segment")).to_have_count(len(SEGMENTS))
    page.locator("#waveform").click()
    expect(page.locator(".segment.current")).to_be_visible()
    page.get_by_label("Find in this transcript").fill("so")
    expect(page.locator("#matches")).to_have_text("1 found")


def show_editor(page: Page) -> None:
    expect(page.locator(".segment")).to_have_count(len(SEGMENTS))
    page.get_by_role("button", name="Correct the segment at 0:04").click()
    expect(page.get_by_role("textbox", name="Text")).to_be_visible()
    page.locator("summary", has_text="Export").click()


def show_operate(page: Page) -> None:
    page.goto("/app/operate")
    expect(page.locator("#live.connected")).to_be_visible()
    expect(page.locator("#jobs tr")).not_to_have_count(0)
    for summary in page.locator("summary").all():
        summary.click()
    page.get_by_role("button", name="Retry all that match").click()
    expect(page.locator(".toast")).to_be_visible()


def show_webhooks(page: Page) -> None:
    expect(page.locator("#endpoints .name").first).to_be_visible()
    page.locator("#adding summary").click()
    page.get_by_role("button", name="Add it").click()
    expect(page.locator("#add-problem")).to_be_visible()
    page.get_by_role("button", name="Send a test").click()
    expect(page.locator(".toast")).to_be_visible()
    page.get_by_role("button", name="New secret").first.click()
    page.get_by_role("button", name="Make it").click()
    expect(page.locator("#secret")).to_be_visible()


def show_webhook(page: Page) -> None:
    page.get_by_role("button", name="Details of").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()


def show_dialog(page: Page) -> None:
    show_operate(page)
    page.get_by_role("button", name="Pause the queue").click()
    expect(page.get_by_role("dialog")).to_be_visible()


PAGES: dict[str, tuple[str, Callable[[Page], None] | None]] = {
    "list": ("/app", show_list),
    "options": ("/app", show_options),
    "completed": ("completed", show_completed),
    "editor": ("completed", show_editor),
    "failed": ("failed", None),
    "cancelled": ("cancelled", None),
    "queued": ("queued", None),
    "processing": ("processing", None),
    "webhooks": ("/app/webhooks", show_webhooks),
    "a webhook": ("/app/webhooks", show_webhook),
    "operate": ("/app/operate", show_operate),
    "dialog": ("/app/operate", show_dialog),
    "not found": ("/app/nowhere", None),
}


def violations(page: Page, **options: Any) -> list[Any]:
    """Return what axe-core finds wrong, of any impact, and where."""
    found = axe.run(page, options={"resultTypes": ["violations"], **options}).response
    return [
        (rule["id"], rule["impact"], [node["html"][:200] for node in rule["nodes"][:3]])
        for rule in found["violations"]
    ]


def in_all_looks(page: Page) -> list[Any]:
    """Return what is wrong with the page as it stands, on any screen."""
    contrast = {"runOnly": ["color-contrast"]}
    found: list[Any] = []
    for size in (DESKTOP, PHONE):
        look(page, size, "dark")
        found += violations(page, **contrast)
        look(page, size, "light")
        found += violations(page)
        found += overflowing(page)
    for width in WIDTHS:
        look(page, (width, 450), "light")
        found += overflowing(page)
    look(page, DESKTOP, "light")
    levels = page.locator("h1, h2, h3").evaluate_all(
        "all => all.filter((one) => one.checkVisibility()).map((one) => Number(one.tagName[1]))"
    )
    if levels[:1] != [1] or any(after > before + 1 for before, after in pairwise(levels)):
        found.append(("headings", levels))
    return found


def look(page: Page, size: tuple[int, int], scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")


def overflowing(page: Page) -> list[Any]:
    """Return what reaches beyond the window, unless it is in something that scrolls by itself."""
    found: list[str] = page.evaluate(
        """() => {
          const width = document.documentElement.clientWidth;
          if (document.documentElement.scrollWidth <= width) return [];
          return [...document.querySelectorAll("body *")]
            .filter((one) => one.getBoundingClientRect().right > width + 0.5)
            .filter((one) => !one.closest(".scroll, .segmented, nav"))
            .slice(0, 3).map((one) => one.outerHTML.slice(0, 120));
        }"""
    )
    size = page.viewport_size
    return [("wider than the window", size, found)] if found else []


def path_of(where: str, jobs: dict[str, UUID]) -> str:
    return where if where.startswith("/") else f"/app/jobs/{jobs[where]}"


def test_every_page(
    site: Site, ann: tuple[UUID, str], jobs: dict[str, UUID], complained: list[str]
) -> None:
    """By all rules of axe-core, light and dark, large, small and enlarged."""
    wrong: dict[str, list[Any]] = {}
    page = site.open()
    page.goto("/app/sign-in")
    wrong["sign-in"] = in_all_looks(page)
    wrong_password(page)
    wrong["sign-in, refused"] = in_all_looks(page)
    sign_in(page, site.new_user()[1])
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    wrong["empty list"] = in_all_looks(page)
    show_uploading(page)
    wrong["uploading"] = in_all_looks(page)
    page.close()
    page = as_ann(site, ann)
    for name, (where, prepare) in PAGES.items():
        page.goto(path_of(where, jobs))
        if where in jobs:
            expect(page.locator("#status")).to_have_text(where.title())
        if prepare:
            prepare(page)
        wrong[name] = in_all_looks(page)
    page.close()
    assert not {name: found for name, found in wrong.items() if found}
    # The password that was refused, the page that there is not.
    assert all("422" in said or "404" in said for said in complained), complained
    complained.clear()


def test_the_player_leaves_room_and_hides_nothing_that_has_the_focus(
    site: Site, ann: tuple[UUID, str], jobs: dict[str, UUID]
) -> None:
    page = as_ann(site, ann, viewport={"width": 640, "height": 450})
    page.goto(path_of("completed", jobs))
    expect(page.locator(".segment")).to_have_count(len(SEGMENTS))
    for button in page.locator(".segment button").all():
        button.focus()
        box, player = button.bounding_box(), page.locator("#player").bounding_box()
        assert box is not None
        assert player is not None
        assert box["y"] + box["height"] <= player["y"] + 1
        assert player["height"] < 225


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the control of that name has the focus, and see that it shows it."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if focused(page) == name:
            outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid", f"{name} does not show that it has the focus"
            return
    raise AssertionError(f"Tab does not lead to {name}; it is at {focused(page)}")


def focused(page: Page) -> str:
    said: str = page.evaluate(
        """() => {
          const at = document.activeElement;
          return at.ariaLabel || at.labels?.[0]?.innerText.trim() || at.innerText?.trim() || "";
        }"""
    )
    return said


def test_finding_and_exporting_by_keyboard_alone(
    site: Site, seed: Seed, ann: tuple[UUID, str]
) -> None:
    page = as_ann(site, ann)
    page.goto(f"/app/jobs/{seed.transcript(ann[0], SEGMENTS)}")
    expect(page.locator(".segment")).to_have_count(len(SEGMENTS))
    tab_to(page, "Skip to content")
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    tab_to(page, "Find in this transcript")
    page.keyboard.type("so so")
    page.keyboard.press("Enter")
    expect(page.locator("#matches")).to_have_text("Not found")
    page.keyboard.press("Escape")
    tab_to(page, "Export")
    page.keyboard.press("Enter")
    text = page.get_by_role("link", name="Text (.txt)", exact=True)
    expect(text).to_be_visible()
    page.keyboard.press("Escape")
    expect(text).to_be_hidden()
    assert focused(page) == "Export"
    page.keyboard.press("Enter")
    tab_to(page, "Subtitles (.srt)")
    with page.expect_download() as downloading:
        page.keyboard.press("Enter")
    assert downloading.value.suggested_filename == "talk.srt"
    expect(text).to_be_hidden()


def test_listening_and_correcting_by_keyboard_alone(
    site: Site, seed: Seed, ann: tuple[UUID, str]
) -> None:
    page = as_ann(site, ann)
    page.goto(f"/app/jobs/{seed.transcript(ann[0], SEGMENTS)}")
    expect(page.locator(".segment")).to_have_count(len(SEGMENTS))
    tab_to(page, "Play from 0:04")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.keyboard.press("k")
    expect(page.get_by_role("button", name="Play", exact=True)).to_be_visible()
    tab_to(page, "Correct the segment at 0:04")
    page.keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Text")).to_be_focused()
    page.keyboard.press("Control+A")
    page.keyboard.type("Somebody spoke. k l j")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".segment").nth(1).locator(".said")).to_have_text("Somebody spoke. k l j")
    expect(page.get_by_role("button", name="Correct the segment at 0:04")).to_be_focused()
    tab_to(page, "Position")
    page.keyboard.press("End")
    expect(page.locator("#position")).to_have_text("0:15")
    expect(page.locator("#waveform")).to_have_attribute("aria-valuetext", "0:15 of 0:16")
    page.keyboard.press("Home")
    expect(page.locator("#position")).to_have_text("0:00")
    tab_to(page, "Speed")
    page.keyboard.press("ArrowDown")
    assert page.locator("#audio").evaluate("audio => audio.playbackRate") == 1.25


def test_motion_is_left_out_where_people_do_not_want_it(
    site: Site, ann: tuple[UUID, str], jobs: dict[str, UUID]
) -> None:
    moving = """() => [...document.querySelectorAll("*")].flatMap((one) => ["", "::before"]
      .map((part) => getComputedStyle(one, part || null))).filter((style) =>
        style.animationName !== "none"
        || style.transitionDuration.split(", ").some((time) => time !== "0s"),
      ).length + document.getAnimations().length"""
    for preference, expected in (("no-preference", True), ("reduce", False)):
        page = as_ann(site, ann, reduced_motion=preference)
        page.goto(path_of("processing", jobs))
        expect(page.locator("#status")).to_have_text("Processing")
        assert (page.evaluate(moving) > 0) == expected


def test_without_colours(site: Site, ann: tuple[UUID, str], jobs: dict[str, UUID]) -> None:
    """With the system's few colours, what only a colour would say has a line or a word as well."""
    page = as_ann(site, ann, forced_colors="active")
    page.goto(path_of("completed", jobs) + "?t=1.5")
    lit = page.locator(".word.lit")
    expect(lit).to_have_css("outline-style", "solid")
    expect(page.locator(".segment.current")).to_have_css("border-top-style", "solid")
    expect(page.locator(".segment.doubtful .mark").first).to_have_text("perhaps no speech")
    fills = page.locator("#waveform path").evaluate_all(
        "paths => paths.map((path) => getComputedStyle(path).fill)"
    )
    assert len(fills) == len(set(fills)) == 2
    head = page.locator("#waveform .head").evaluate(
        "head => getComputedStyle(head, '::before').borderLeftStyle"
    )
    assert head == "solid"
    page.goto("/app/operate")
    bars = page.locator("#throughput rect.series-1").first
    expect(bars).to_be_visible()
    series = page.locator("#throughput").evaluate(
        "place => [1, 2, 3].map((number) => {"
        " const bar = place.querySelector(`rect.series-${number}`);"
        " return bar && getComputedStyle(bar).fill; })"
    )
    assert len({colour for colour in series if colour}) == len([c for c in series if c])
