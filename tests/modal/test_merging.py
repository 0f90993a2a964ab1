from dataclasses import replace
from itertools import pairwise
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modal_functions.errors import NoSpeech
from modal_functions.merging import Part, merge
from modal_functions.transcript import Segment, Transcript, Word

NAME: Final = "'talk.mp3'"
TIME = st.floats(-5, 130)  # also outside the span, as engines tell sometimes


def segment(start: float, end: float, text: str, *, words: bool = False) -> Segment:
    length = (end - start) / max(1, len(text.split()))
    found = tuple(
        Word(start + index * length, start + (index + 1) * length, word, 0.9)
        for index, word in enumerate(text.split())
    )
    return Segment(start, end, text, -0.2, 0.01, 1.2, found if words else None)


def transcript(*segments: Segment, language: str = "en", duration: float = 60) -> Transcript:
    text = " ".join(segment.text for segment in segments)
    return Transcript(text, language, duration, segments, "faster-whisper", "base")


SILENT: Final = transcript(language="")


@st.composite
def recordings(draw: st.DrawFn) -> list[Part]:
    """Draw spans with numbered words, so that none can go unnoticed, at any times at all."""
    parts: list[Part] = []
    start, number = 0.0, 0
    for length in draw(st.lists(st.floats(30, 90), min_size=1, max_size=5)):
        segments = []
        for count in draw(st.lists(st.integers(1, 4), max_size=4)):
            text = " ".join(f"w{number + index}" for index in range(count))
            number += count
            times = draw(st.lists(TIME, min_size=2 + 2 * count, max_size=2 + 2 * count))
            words = tuple(
                Word(times[2 * index + 2], times[2 * index + 3], word, 0.5)
                for index, word in enumerate(text.split())
            )
            segments.append(Segment(times[0], times[1], text, -0.2, 0.01, 1.2, words))
        parts.append(((start, start + length), transcript(*segments, duration=length)))
        start += length
    return parts


@given(recordings())
def test_no_word_is_lost_or_doubled_and_time_never_goes_back(parts: list[Part]) -> None:
    said = [f"w{n}" for n in range(sum(len(part.text.split()) for _, part in parts))]
    if not said:
        with pytest.raises(NoSpeech):
            merge(parts, name=NAME)
        return
    merged = merge(parts, name=NAME)
    assert merged.text.split() == said
    assert " ".join(segment.text for segment in merged.segments) == merged.text
    assert [word.word for segment in merged.segments for word in segment.words or ()] == said
    assert merged.duration == parts[-1][0][1]
    times = [time for segment in merged.segments for time in (segment.start, segment.end)]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= merged.duration
    for one in merged.segments:
        within = [one.start, *(t for w in one.words or () for t in (w.start, w.end)), one.end]
        assert within == sorted(within)


@given(recordings())
def test_segments_stay_in_their_span(parts: list[Part]) -> None:
    owners = [times for times, part in parts for _ in part.segments]
    if owners:
        for (start, end), one in zip(owners, merge(parts, name=NAME).segments, strict=True):
            assert start <= one.start <= one.end <= end


def test_times_are_moved_and_marks_kept() -> None:
    first = transcript(segment(1, 3, "Hello there.", words=True))
    second = transcript(segment(0.5, 2, "General Kenobi.", words=True), duration=40)
    merged = merge([((0, 60), first), ((60, 100), second)], name=NAME)
    assert merged == Transcript(
        text="Hello there. General Kenobi.",
        language="en",
        duration=100,
        segments=(
            segment(1, 3, "Hello there.", words=True),
            segment(60.5, 62, "General Kenobi.", words=True),
        ),
        engine="faster-whisper",
        model="base",
    )


def test_one_part_is_the_whole() -> None:
    only = transcript(segment(0, 3, "Hello there."))
    assert merge([((0, 60), only)], name=NAME) == only


def test_a_word_said_on_both_sides_of_a_seam_was_said_twice() -> None:
    parts = [
        ((0.0, 60.0), transcript(segment(55, 60, "it was very"))),
        ((60.0, 99.0), transcript(segment(0, 3, "very cold"))),
    ]
    assert merge(parts, name=NAME).text == "it was very very cold"


def test_parts_without_speech_are_fine_as_long_as_one_has_some() -> None:
    dots = transcript(segment(0, 30, "..."))
    spoken = transcript(segment(5, 6, "Yes."), language="fr")
    merged = merge([((0, 60), SILENT), ((60, 120), spoken), ((120, 180), dots)], name=NAME)
    assert (merged.text, merged.language, merged.duration) == ("Yes.", "fr", 180)
    with pytest.raises(NoSpeech, match=r"No speech was found in 'talk\.mp3'"):
        merge([((0, 60), SILENT), ((60, 120), dots)], name=NAME)


def test_the_language_is_that_of_most_of_the_speech() -> None:
    french = transcript(segment(0, 50, "Bonjour."), language="fr")
    english = transcript(segment(0, 20, "Hello."), language="en")
    parts = [((0.0, 60.0), english), ((60.0, 120.0), french), ((120.0, 180.0), english)]
    assert merge(parts, name=NAME).language == "fr"
    equals = [((0.0, 60.0), english), ((60.0, 120.0), replace(english, language="de"))]
    assert merge(equals, name=NAME).language == "en"


def test_text_is_joined_as_the_language_is_written() -> None:
    chinese = transcript(segment(0, 50, "你好。"), language="zh")
    parts = [((0.0, 60.0), chinese), ((60.0, 120.0), chinese)]
    assert merge(parts, name=NAME).text == "你好。你好。"
    assert merge(parts, name=NAME, task="translate").text == "你好。 你好。"


def test_loops_across_a_seam_are_flagged() -> None:
    thanks = [segment(start, start + 2, "Thank you.") for start in (0, 10, 20)]
    parts = [
        ((0.0, 60.0), transcript(segment(0, 3, "Goodbye, all of you."), thanks[1], thanks[2])),
        ((60.0, 99.0), transcript(thanks[0], segment(5, 9, "Now the weather."))),
    ]
    flags = [one.flags for one in merge(parts, name=NAME).segments]
    assert flags == [(), ("repetition",), ("repetition",), ("repetition",), ()]


@pytest.mark.parametrize(
    "spans",
    [[], [(1, 60)], [(0, 60), (61, 90)], [(0, 60), (0, 60)], [(60, 90), (0, 60)]],
)
def test_missing_parts_do_not_go_unnoticed(spans: list[tuple[float, float]]) -> None:
    spoken = transcript(segment(0, 3, "Hello."))
    with pytest.raises(ValueError, match="cover the recording"):
        merge([(span, spoken) for span in spans], name=NAME)


def test_times_survive_rounding() -> None:
    spoken = transcript(segment(0, 3, "Hello."))
    parts = [((0.0, 60.0194), spoken), ((60.019, 90.0), spoken)]
    times = [(one.start, one.end) for one in merge(parts, name=NAME).segments]
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(times))
