"""One user's way through the app: upload, watch, read, listen, correct, export."""

import re
from pathlib import Path

import pytest
import srt
from playwright.sync_api import Page, expect

from tests.browser.conftest import SLOW

pytestmark = pytest.mark.usefixtures("worker")


def words_of(page: Page) -> list[tuple[float, str]]:
    """Return the words of the transcript with their times."""
    expect(page.locator(".word").first).to_be_visible()
    found: list[list[object]] = page.locator(".word").evaluate_all(
        "words => words.map((word) => [Number(word.dataset.start), word.textContent])"
    )
    return [(float(str(start)), str(word)) for start, word in found]


def test_from_a_recording_to_corrected_subtitles(page: Page, long_recording: Path) -> None:
    expect(page.get_by_text("Nothing here yet")).to_be_visible()
    page.set_input_files("#files", long_recording)
    row = page.locator("li.job", has_text="three times.mp3")
    expect(row.locator(".status.processing")).to_be_visible(timeout=SLOW)

    # Live progress, and the text as far as it is there.
    row.get_by_role("link", name="three times.mp3").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("three times.mp3")
    expect(page.locator("#partial-text")).to_contain_text("lighthouse", timeout=SLOW)
    expect(page.locator("#work")).to_be_visible()
    progress = float(page.locator("#progress").evaluate("bar => bar.value"))
    assert 0 < progress < 1
    expect(page.locator("#work-text")).to_contain_text(re.compile(r"\d+ % · .+ left"))

    # The transcript appears without anybody having asked for it.
    expect(page.locator("#segments .segment").first).to_contain_text("lighthouse", timeout=SLOW)
    expect(page.locator("#work")).to_be_hidden()
    listen(page)
    find(page)
    correct(page)
    export(page)


def listen(page: Page) -> None:
    """The word that is spoken is lit, and a click on a word plays from there."""
    words = words_of(page)
    assert len(words) > 300
    assert [start for start, _ in words] == sorted(start for start, _ in words)
    assert page.locator("#waveform .bars").evaluate("path => path.getAttribute('d').length") > 1000
    at, _ = words[40]
    page.locator(".word").nth(40).click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    audio = page.locator("#audio")
    assert audio.evaluate("audio => audio.currentTime") >= at - 0.1
    # It plays, and the light goes on to the words that follow.
    page.wait_for_function(
        "at => document.getElementById('audio').currentTime > at", arg=words[44][0]
    )
    audio.evaluate("audio => audio.pause()")
    page.wait_for_function("() => document.getElementById('audio').paused")
    expect(page.get_by_role("button", name="Play", exact=True)).to_be_visible()
    now = float(audio.evaluate("audio => audio.currentTime"))
    spoken = [word for start, word in words if start <= now + 0.02][-1]
    expect(page.locator(".word.lit")).to_have_text(spoken)
    # By keyboard and by the waveform, too.
    page.locator("#waveform").focus()
    page.keyboard.press("Home")
    expect(page.locator("#position")).to_have_text("0:00")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#position")).to_have_text("0:05")
    box = page.locator("#waveform").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(page.locator("#position")).to_have_text(re.compile(r"1:2\d"))
    expect(page.locator(".segment.current")).to_have_count(1)


def find(page: Page) -> None:
    """Matches are counted and painted, one after the other."""
    page.get_by_label("Find in this transcript").fill("keepers had")
    expect(page.locator("#matches")).to_have_text(re.compile(r"^[3-6] found$"))
    painted = "() => [...CSS.highlights.get('found')].map(String)"
    assert {match.lower() for match in page.evaluate(painted)} == {"keepers had"}
    page.keyboard.press("Enter")
    expect(page.locator("#matches")).to_have_text(re.compile(r"^1 of "))
    page.get_by_label("Find in this transcript").fill("no such words")
    expect(page.locator("#matches")).to_have_text("Not found")
    page.keyboard.press("Escape")


def correct(page: Page) -> None:
    """Text and speakers are corrected in place, and stay after a reload; the original too."""
    first = page.locator(".segment").first
    original = first.locator(".said").inner_text()
    first.hover()
    first.get_by_role("button", name="Correct").click()
    page.get_by_role("textbox", name="Text").fill("The <b>new</b> lighthouse stood on the road.")
    page.get_by_label("Speaker", exact=True).fill("Ann & Bo")
    page.get_by_label("Name the speaker of").select_option("following")
    page.get_by_role("button", name="Save").click()
    expect(first.locator(".said")).to_have_text("The <b>new</b> lighthouse stood on the road.")
    expect(first.locator(".mark.corrected")).to_be_visible()
    count = page.locator(".segment").count()
    expect(page.locator(".segment .speaker", has_text="Ann & Bo")).to_have_count(count)
    page.reload()
    expect(first.locator(".said")).to_have_text("The <b>new</b> lighthouse stood on the road.")

    # Renamed everywhere, and the text put back.
    first.hover()
    first.get_by_role("button", name="Correct").click()
    page.get_by_label("Speaker", exact=True).fill("Ann")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".segment .speaker", has_text="Ann & Bo")).to_have_count(0)
    expect(page.locator(".segment .speaker", has_text="Ann")).to_have_count(count)
    first.hover()
    first.get_by_role("button", name="Correct").click()
    page.get_by_role("button", name="Back to the original text").click()
    expect(first.locator(".said")).to_have_text(original)
    # One that should not be there at all.
    second = page.locator(".segment").nth(1)
    second.hover()
    second.get_by_role("button", name="Correct").click()
    page.get_by_role("textbox", name="Text").fill("")
    page.keyboard.press("Control+Enter")
    expect(second).to_have_class(re.compile("removed"))


def export_as(page: Page, kind: str) -> None:
    page.locator("summary", has_text="Export").click()
    page.get_by_role("link", name=f"(.{kind})").click()


def export(page: Page) -> None:
    """Exports have what was corrected."""
    with page.expect_download() as downloading:
        export_as(page, "srt")
    download = downloading.value
    assert download.suggested_filename == "three times.srt"
    cues = list(srt.parse(download.path().read_text()))
    assert cues[0].content.replace("\n", " ").startswith("Ann: The old lighthouse")
    assert not any("For many years" in cue.content for cue in cues[:3]), "it was left out"
    for kind in ("txt", "vtt", "tsv", "json"):
        with page.expect_download() as downloading:
            export_as(page, kind)
        assert downloading.value.suggested_filename == f"three times.{kind}"
        assert "Ann" in downloading.value.path().read_text()


def test_a_recording_without_speech_says_so(page: Page, silence: Path) -> None:
    page.set_input_files("#files", silence)
    row = page.locator("li.job", has_text="silence.wav")
    expect(row.locator(".problem")).to_contain_text("is silent", timeout=SLOW)
    row.get_by_role("link", name="silence.wav").click()
    expect(page.get_by_role("heading", name="could not be transcribed")).to_be_visible()
    expect(page.locator("#failure-text")).to_contain_text("'silence.wav' is silent")
    expect(page.locator("#failure-hint")).to_contain_text("(no_speech)")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#work")).to_be_visible()
    expect(page.get_by_role("heading", name="could not be transcribed")).to_be_visible(timeout=SLOW)


def test_what_is_said_into_the_microphone_is_transcribed(page: Page) -> None:
    page.get_by_role("button", name="Record").click()
    expect(page.locator("#recorded")).to_have_text(re.compile(r"^0:(0[6-9]|[1-5]\d)$"))
    page.get_by_role("button", name="Transcribe it").click()
    row = page.locator("li.job", has_text="Recording ")
    expect(row.locator(".status.completed")).to_be_visible(timeout=SLOW)
    row.get_by_role("link").click()
    expect(page.locator("#segments")).to_contain_text(
        re.compile("lighthouse|keepers|sea", re.IGNORECASE)
    )


def test_a_running_job_is_cancelled_from_its_page(page: Page, long_recording: Path) -> None:
    page.set_input_files("#files", long_recording)
    row = page.locator("li.job", has_text="three times.mp3")
    expect(row.locator(".status.processing")).to_be_visible(timeout=SLOW)
    row.get_by_role("link", name="three times.mp3").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("heading", name="Cancelled")).to_be_visible(timeout=SLOW)
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
