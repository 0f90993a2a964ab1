"""The transcript page's finer points, on transcripts of all kinds."""

import re
from typing import Any
from uuid import UUID

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Site, sign_in
from tests.browser.seed import Seed, segment


def show(page: Page, job: UUID, query: str = "") -> None:
    page.goto(f"/app/jobs/{job}{query}")
    expect(page.locator(".segment").first).to_be_visible()


def at(page: Page, seconds: float) -> None:
    """Be at that time of the recording."""
    page.locator("#audio").evaluate("(audio, at) => { audio.currentTime = at; }", seconds)


def now(page: Page) -> float:
    return float(page.locator("#audio").evaluate("audio => audio.currentTime"))


def found(page: Page) -> list[str]:
    """Return what is painted as found."""
    texts: list[str] = page.evaluate("[...CSS.highlights.get('found')].map(String)")
    return texts


def test_the_word_that_is_spoken_is_lit(page: Page, seed: Seed, user: tuple[UUID, str]) -> None:
    job = seed.transcript(user[0], [
        segment("One two three four.", 0, 4, "One", "two", "three", "four."),
        segment("Guessed by length, roughly.", 10, 20),
        segment("Last.", 30, 31, "Last."),
    ])  # fmt: skip
    show(page, job)
    lit = page.locator(".word.lit")
    for seconds, word in (
        (0.1, "One"),
        (1.5, "two"),
        (3.99, "four."),
        (10, "Guessed"),
        (19, "roughly."),
    ):
        at(page, seconds)
        expect(lit).to_have_text(word)
    # By length: 8 + 3 + 7 + 9 characters with what stands between them, in 10 s.
    starts = (
        page.locator(".segment")
        .nth(1)
        .locator(".word")
        .evaluate_all("words => words.map((word) => Number(word.dataset.start))")
    )
    assert starts == [10, 12.857, 13.929, 16.786]
    # Between segments nobody speaks; the segment before stays the current one.
    at(page, 6)
    expect(lit).to_have_count(0)
    expect(page.locator(".segment.current")).to_contain_text("One two three")
    at(page, 31)
    expect(lit).to_have_text("Last.")


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("ja", "昔々、灯台がありました。", ("昔々、", "灯台が", "ありました。")),
        ("zh", "从前有一座灯塔。", None),
        ("th", "มีประภาคาร", ("มี", "ประภาคาร")),
        ("en", "Rock'n'roll — “yes”, she said…", ("Rock'n'roll", "“yes”,", "she", "said…")),
    ],
)
def test_text_stands_as_it_was_written(
    page: Page,
    seed: Seed,
    user: tuple[UUID, str],
    language: str,
    text: str,
    words: tuple[str, ...] | None,
) -> None:
    job = seed.transcript(user[0], [segment(text, 0, 8, *(words or ()))], language=language)
    show(page, job)
    expect(page.locator(".said")).to_have_text(text, use_inner_text=True)
    shown = list(words or text)
    expect(page.locator(".word")).to_have_text(shown)
    at(page, 7.9)
    expect(page.locator(".word.lit")).to_have_text(shown[-1])


def test_corrected_segments_say_so_and_have_times(
    page: Page, seed: Seed, site: Site, user: tuple[UUID, str]
) -> None:
    job = seed.transcript(user[0], [
        segment("Hello word.", 0, 4, "Hello", "word."), segment("Um.", 4, 5, "Um."),
    ])  # fmt: skip
    site.conn.execute(
        "insert into transcript_corrections (job_id, segment, text, speaker)"
        " values (%s, 0, 'Hello <i>world</i> & all.', 'Ann'), (%s, 1, '', 'Ann')",
        (job, job),
    )
    show(page, job)
    first, second = page.locator(".segment").all()
    expect(first.locator(".said")).to_have_text("Hello <i>world</i> & all.")
    expect(first.locator(".mark")).to_have_text("corrected")
    expect(first.locator(".mark")).to_have_attribute("title", "Originally: Hello word.")
    at(page, 0.1)
    expect(page.locator(".word.lit")).to_have_text("Hello")
    at(page, 3.95)
    expect(page.locator(".word.lit")).to_have_text("all.")
    expect(second.locator(".mark")).to_have_text("left out")
    expect(second.locator(".said")).to_have_css("text-decoration-line", "line-through")
    # A speaker is named where he begins.
    expect(first.locator(".speaker")).to_be_visible()
    expect(second.locator(".speaker")).to_be_hidden()


def test_doubtful_segments_are_visited_one_after_the_other(
    page: Page, seed: Seed, user: tuple[UUID, str]
) -> None:
    flags = {3: ["low_confidence"], 20: ["repetition", "no_speech"], 50: ["low_confidence"]}
    job = seed.transcript(
        user[0],
        [
            segment(f"Segment {n}.", n, n + 1, **({"flags": flags[n]} if n in flags else {}))
            for n in range(60)
        ],
    )
    show(page, job)
    button = page.locator("#doubts")
    expect(button).to_have_text("3 doubtful segments")
    expect(page.locator(".segment.doubtful")).to_have_count(3)
    assert page.locator(".segment").nth(20).locator(".mark").all_inner_texts() == [
        "repeats itself", "perhaps no speech",
    ]  # fmt: skip
    expect(page.locator("#waveform .doubts rect")).to_have_count(3)
    for minute in ("0:03", "0:20", "0:50", "0:03"):
        button.click()
        time = page.get_by_role("button", name=f"Play from {minute}")
        expect(time).to_be_focused()
        expect(time).to_be_in_viewport()
    # What is corrected is in doubt no more.
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_role("textbox", name="Text").fill("That is what was said.")
    page.get_by_role("button", name="Save").click()
    expect(button).to_have_text("2 doubtful segments")
    expect(page.locator("#waveform .doubts rect")).to_have_count(2)
    button.click()
    expect(page.get_by_role("button", name="Play from 0:20")).to_be_focused()


def test_hits_of_a_search_begin_where_it_was_said(
    page: Page, seed: Seed, user: tuple[UUID, str]
) -> None:
    many = [segment(f"Number {n} of many.", n, n + 1) for n in range(200)]
    job = seed.transcript(user[0], many)
    show(page, job, "?t=112.5")
    expect(page.locator("#position")).to_have_text("1:52")
    current = page.locator(".segment.current")
    expect(current).to_contain_text("Number 112 of many.")
    expect(current).to_be_in_viewport(ratio=1)
    assert page.locator("#audio").evaluate("audio => audio.paused")
    page.get_by_role("button", name="Play", exact=True).click()
    page.wait_for_function("() => document.getElementById('audio').currentTime > 112.6")
    assert now(page) < 130
    for nonsense in ("?t=x", "?t=-5", "?t=1e99", "?t="):
        show(page, job, nonsense)
        expect(page.locator(".segment")).to_have_count(200)
    assert now(page) == 0


def test_keys(page: Page, seed: Seed, user: tuple[UUID, str]) -> None:
    job = seed.transcript(user[0], [segment("One and two.", 0, 60)])
    show(page, job)
    paused = "document.getElementById('audio').paused"
    page.wait_for_function("() => document.getElementById('audio').readyState > 0")
    position = page.locator("#position")
    # Letters count only where one plays or reads.
    page.locator("h1").click()
    page.keyboard.type("lkl")
    assert page.evaluate(paused)
    page.locator("#segments").click(position={"x": 3, "y": 3})
    for key, expected in (
        ("l", "0:05"),
        ("l", "0:10"),
        ("j", "0:05"),
        ("j", "0:00"),
        ("j", "0:00"),
    ):
        page.keyboard.press(key)
        expect(position).to_have_text(expected)
    page.keyboard.press("Space")
    page.wait_for_function(f"() => !{paused}")
    page.keyboard.press("k")
    page.wait_for_function(f"() => {paused}")
    # Also once a button has the focus, which keeps the space bar for itself.
    forward = page.get_by_role("button", name="Forward 5 seconds")
    page.keyboard.press("Home")
    at(page, 0)
    forward.click()
    page.keyboard.press("l")
    expect(position).to_have_text("0:10")
    page.keyboard.press("Space")
    expect(position).to_have_text("0:15")
    assert page.evaluate(paused)
    # With others it is the browser's own.
    page.keyboard.press("Control+l")
    expect(position).to_have_text("0:15")
    # Nobody wants to hear it while typing.
    page.get_by_label("Find in this transcript").click()
    page.keyboard.type("l j k")
    expect(page.get_by_label("Find in this transcript")).to_have_value("l j k")
    page.locator(".segment").hover()
    page.locator(".segment .edit").click()
    page.keyboard.type("jkl ")
    expect(page.get_by_role("textbox", name="Text")).to_have_value("One and two.jkl ")
    page.get_by_label("Speaker", exact=True).press_sequentially("k l")
    expect(position).to_have_text("0:15")
    assert page.evaluate(paused)


FINDABLE = [
    segment(
        "We use C++ (mostly), a.*b and $5 [sic].", 0, 4,
        "We", "use", "C++", "(mostly),", "a.*b", "and", "$5", "[sic].",
    ),
    segment("İstanbul, straße, STRASSE, ΣΟΦΟΣ and σοφος.", 4, 8),
    segment("Party 🎉🎉 on! 👩‍💻 codes.", 8, 12, "Party", "🎉🎉", "on!", "👩‍💻", "codes."),
    segment("Cafe\u0301 and café and cafe.", 12, 16),
    segment("昔々灯台がありました。", 16, 20, "昔々", "灯台が", "ありました。"),
]  # fmt: skip


FINDS = {
    "c++ (": ["C++ ("],
    "  USE   c++ ": ["use C++"],
    "a.*b": ["a.*b"],
    "$5 [sic]": ["$5 [sic]"],
    ".": ["."] * 5,
    "İ": ["İ"],
    "istanbul": [],
    "straße": ["straße"],
    "strasse": ["STRASSE"],
    "σοφος": ["ΣΟΦΟΣ", "σοφος"],
    "🎉": ["🎉", "🎉"],
    "🎉 on! 👩‍💻 c": ["🎉 on! 👩‍💻 c"],
    "café": ["Cafe\u0301", "café"],
    "cafe\u0301 and": ["Cafe\u0301 and", "café and"],
    "台があ": ["台があ"],
    "\\": [],
}


def test_find(page: Page, seed: Seed, user: tuple[UUID, str]) -> None:
    show(page, seed.transcript(user[0], FINDABLE))
    for q, expected in FINDS.items():
        page.get_by_label("Find in this transcript").fill(q)
        said = f"{len(expected)} found" if expected else "Not found"
        expect(page.locator("#matches")).to_have_text(said)
        assert found(page) == expected


def test_from_match_to_match_and_around(page: Page, seed: Seed, user: tuple[UUID, str]) -> None:
    texts = [
        f"Segment {n}, {'where it is' if n in {1, 100, 180} else 'without'}." for n in range(200)
    ]
    job = seed.transcript(user[0], [segment(text, n, n + 1) for n, text in enumerate(texts)])
    show(page, job)
    search = page.get_by_label("Find in this transcript")
    matches = page.locator("#matches")
    following = page.get_by_role("button", name="Next match")
    previous = page.get_by_role("button", name="Previous match")
    expect(following).to_be_disabled()
    search.fill("where it is")
    expect(matches).to_have_text("3 found")
    for button, number, index in (
        (following, 1, 1), (following, 2, 100), (following, 3, 180), (following, 1, 1),
        (previous, 3, 180), (previous, 2, 100),
    ):  # fmt: skip
        button.click()
        expect(matches).to_have_text(f"{number} of 3")
        expect(page.locator(".segment").nth(index)).to_be_in_viewport(ratio=1)
        assert page.evaluate("[...CSS.highlights.get('found-now')].map(String)") == ["where it is"]
    search.fill("where it is ")
    expect(matches).to_have_text("3 found")
    previous.click()
    expect(matches).to_have_text("3 of 3")
    search.press("Escape")
    expect(search).to_have_value("")
    expect(matches).to_have_text("")
    assert found(page) == []


def test_copying_and_speed(page: Page, site: Site, seed: Seed, user: tuple[UUID, str]) -> None:
    job = seed.transcript(user[0], [segment("Grüße & <b>.", 0, 30), segment("Ende.", 30, 60)])
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.url)
    show(page, job)
    page.get_by_role("button", name="Copy text").click()
    expect(page.locator(".toast")).to_have_text("The text is on the clipboard")
    assert page.evaluate("navigator.clipboard.readText()") == "Grüße & <b>. Ende.\n"
    page.get_by_label("Speed").select_option("2")
    page.get_by_role("button", name="Play from 0:30").click()
    page.wait_for_function("() => document.getElementById('audio').currentTime > 30.5")
    assert page.locator("#audio").evaluate("audio => audio.playbackRate") == 2


def test_what_cannot_be_copied_is_said(
    page: Page, seed: Seed, site: Site, user: tuple[UUID, str], complained: list[str]
) -> None:
    job = seed.transcript(user[0], [segment("Text.", 0, 5)])
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.url)
    show(page, job)
    page.evaluate("navigator.clipboard.writeText('what was there before')")
    site.conn.execute("delete from processing_jobs where id = %s", (job,))
    page.get_by_role("button", name="Copy text").click()
    expect(page.locator(".toast")).to_contain_text("Not copied. ")
    assert page.evaluate("navigator.clipboard.readText()") == "what was there before"
    assert complained
    assert all("404" in said for said in complained)  # the player may ask for the audio, too
    complained.clear()


def test_audio_that_is_gone(
    page: Page, seed: Seed, user: tuple[UUID, str], complained: list[str]
) -> None:
    job = seed.transcript(user[0], [segment("Still to be read.", 0, 5)], "gone.wav", audio=False)
    show(page, job)
    expect(page.locator("#audio-problem")).to_contain_text("no longer in storage")
    expect(page.locator(".said")).to_have_text("Still to be read.")
    assert all("404" in said for said in complained)
    assert complained
    complained.clear()


def test_a_job_that_is_deleted_while_it_is_looked_at(
    page: Page, seed: Seed, site: Site, user: tuple[UUID, str], complained: list[str]
) -> None:
    job = seed.job(user[0], "runs.mp3", "processing", progress=0.4, seconds=40)
    seed.chunks(job, "What there is so far.", "")
    page.goto(f"/app/jobs/{job}")
    expect(page.locator("#partial-text")).to_have_text("What there is so far.")
    site.conn.execute("delete from processing_jobs where id = %s", (job,))
    expect(page.locator("#failure")).to_contain_text("It has just been deleted.")
    expect(page.locator("#work")).to_be_hidden()
    expect(page.locator("#partial")).to_be_hidden()
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    # One that is completed: what somebody has typed stays.
    job = seed.transcript(user[0], [segment("Text.", 0, 5)])
    show(page, job)
    page.locator(".segment").hover()
    page.get_by_role("button", name="Correct").click()
    site.conn.execute("delete from processing_jobs where id = %s", (job,))
    page.get_by_role("textbox", name="Text").fill("Typed with care.")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("form [role=alert]")).to_contain_text("no such job")
    expect(page.get_by_role("textbox", name="Text")).to_have_value("Typed with care.")
    assert complained
    assert all("404" in said for said in complained)  # the player may ask for the audio, too
    complained.clear()


@pytest.mark.parametrize(
    ("status", "title", "said"),
    [
        ("failed", "This recording could not be transcribed", "no_speech 60 seconds ago"),
        ("cancelled", "Cancelled", "the recording is still there"),
    ],
)
def test_what_ended_without_a_transcript(
    page: Page, seed: Seed, site: Site, user: tuple[UUID, str], status: str, title: str, said: str
) -> None:
    code = "no_speech" if status == "failed" else None
    job = seed.job(user[0], "talk.mp3", status, code=code)
    page.goto(f"/app/jobs/{job}")
    expect(page.get_by_role("heading", name=title)).to_be_visible()
    expect(page.locator("#failure")).to_contain_text(said)
    expect(page.locator("#failure-hint")).to_have_text(
        re.compile(r"Nobody is heard.*\(no_speech\)") if code else ""
    )
    expect(page.locator("#result")).to_be_hidden()
    expect(page.locator("#player")).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#work")).to_contain_text("Waiting for a machine")
    expect(page.locator("#status")).to_have_text("Queued")
    row = site.conn.execute("select status from processing_jobs where id = %s", (job,)).fetchone()
    assert row == ("queued",)


def test_two_tabs_correct_different_segments(
    page: Page, seed: Seed, user: tuple[UUID, str]
) -> None:
    job = seed.transcript(user[0], [segment(f"Segment {n}.", n, n + 1) for n in range(4)])
    other = page.context.new_page()
    show(page, job)
    show(other, job)
    correct(page, 0, "First, by one tab.")
    correct(other, 1, "Second, by the other.")
    texts = ["First, by one tab.", "Second, by the other.", "Segment 2.", "Segment 3."]
    expect(other.locator(".said")).to_have_text(texts)
    expect(page.locator(".said")).to_have_text([texts[0], *(f"Segment {n}." for n in (1, 2, 3))])
    # A form that is open takes nothing away: neither here nor there.
    page.bring_to_front()
    page.locator(".segment").nth(2).hover()
    page.get_by_role("button", name="Correct the segment at 0:02").click()
    page.get_by_role("textbox", name="Text").fill("Third, half typ")
    page.locator(".segment").nth(3).hover()
    page.get_by_role("button", name="Correct the segment at 0:03").click()
    fourth = page.locator(".segment").nth(3)
    fourth.get_by_role("textbox", name="Text").fill("Fourth.")
    fourth.get_by_role("button", name="Save").click()
    expect(page.locator(".segment").nth(1).locator(".said")).to_have_text(texts[1])
    third = page.locator(".segment").nth(2)
    expect(third.get_by_role("textbox", name="Text")).to_have_value("Third, half typ")
    third.get_by_role("textbox", name="Text").press_sequentially("ed.")
    third.get_by_role("button", name="Save").click()
    expect(page.locator(".said")).to_have_text([*texts[:2], "Third, half typed.", "Fourth."])
    # A name that one tab gives is not taken back by another that only corrects the text.
    page.locator(".segment").first.hover()
    page.get_by_role("button", name="Correct the segment at 0:00").click()
    page.get_by_label("Speaker", exact=True).fill("Ann")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".speaker")).to_have_text(["Ann"])
    correct(other, 0, "First, by both.")
    expect(other.locator(".speaker")).to_have_text(["Ann"])


def correct(page: Page, index: int, text: str) -> None:
    page.bring_to_front()
    one = page.locator(".segment").nth(index)
    one.hover()
    one.get_by_role("button", name="Correct").click()
    one.get_by_role("textbox", name="Text").fill(text)
    one.get_by_role("button", name="Save").click()
    expect(one.locator(".said")).to_have_text(text)


def test_escape_closes_what_nothing_was_typed_into_and_nothing_else(
    page: Page, seed: Seed, user: tuple[UUID, str]
) -> None:
    show(page, seed.transcript(user[0], [segment("Short.", 0, 5)]))
    form = page.get_by_role("form", name="Correct the segment at 0:00")
    text, speaker = (
        page.get_by_role("textbox", name="Text"),
        page.get_by_label("Speaker", exact=True),
    )

    def open_it() -> None:
        page.locator(".segment").hover()
        page.get_by_role("button", name="Correct").click()
        expect(text).to_be_focused()

    open_it()
    page.keyboard.press("Escape")
    expect(form).to_be_hidden()
    for field, typed in ((text, "Long."), (speaker, "Ann")):
        open_it()
        field.fill(typed)
        page.keyboard.press("Escape")
        expect(field).to_have_value(typed)
        page.get_by_role("button", name="Cancel").click()
        expect(form).to_be_hidden()


def test_a_correction_that_is_refused_is_not_lost(
    page: Page, seed: Seed, site: Site, user: tuple[UUID, str], complained: list[str]
) -> None:
    job = seed.transcript(user[0], [segment("Short.", 0, 5)])
    show(page, job)
    page.locator(".segment").hover()
    page.get_by_role("button", name="Correct").click()
    text = page.get_by_role("textbox", name="Text")
    text.fill("x" * 10_001)
    page.get_by_label("Speaker", exact=True).fill("Ann")
    page.get_by_role("button", name="Save").click()
    problem = page.locator("form [role=alert]")
    expect(problem).to_contain_text("Text: must have at most 10000 characters, not 10001")
    expect(text).to_have_value("x" * 10_001)
    expect(page.get_by_label("Speaker", exact=True)).to_have_value("Ann")
    expect(page.get_by_role("button", name="Save")).to_be_enabled()
    assert "422" in complained.pop()
    text.fill("x" * 10_000)
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".mark.corrected")).to_be_visible()
    expect(page.locator(".speaker")).to_have_text("Ann")
    # The session ends meanwhile and somebody else signs in: it is not theirs.
    page.locator(".segment").hover()
    page.get_by_role("button", name="Correct").click()
    text.fill("Who am I?")
    page.context.clear_cookies()
    stranger = page.context.new_page()
    sign_in(stranger, site.new_user()[1])
    page.get_by_role("button", name="Save").click()
    expect(problem).to_contain_text("no such job")
    expect(text).to_have_value("Who am I?")
    assert "404" in complained.pop()
    row = site.conn.execute("select text from transcript_corrections where job_id = %s", (job,))
    assert row.fetchone() == ("x" * 10_000,)


def test_what_cannot_be_loaded_can_be_loaded_again(
    page: Page, seed: Seed, user: tuple[UUID, str], complained: list[str]
) -> None:
    job = seed.transcript(user[0], [segment("Here it is.", 0, 5)])
    page.route("**/transcript.json", lambda route: route.abort())
    page.goto(f"/app/jobs/{job}")
    expect(page.get_by_role("heading", name="This could not be loaded")).to_be_visible()
    expect(page.locator("#failure-text")).to_contain_text("can't be reached")
    expect(page.locator("#result")).to_be_hidden()
    assert "ERR_FAILED" in complained.pop()
    page.unroute_all()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".said")).to_have_text("Here it is.")


def test_somebody_elses_transcript(
    page: Page, seed: Seed, site: Site, complained: list[str]
) -> None:
    job = seed.transcript(site.new_user()[0], [segment("Secret.", 0, 5)])
    answer: Any = page.goto(f"/app/jobs/{job}")
    assert answer.status == 404
    expect(page.get_by_role("heading", level=1)).to_have_text("Not Found")
    assert "Secret" not in page.content()
    assert "404" in complained.pop()
