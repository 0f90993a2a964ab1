"""Corrected transcripts: the corrections are in, the rest is as it was, times make sense."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import alignment, subtitles
from jobs.alignment import align
from jobs.corrections import (
    CorrectedSegment,
    Correction,
    Turn,
    apply,
    fingerprint,
    read_transcript,
    turns,
)
from jobs.models import Segment, Transcript, Word

NOW = datetime(2026, 11, 26, tzinfo=UTC)


def correction(segment: int, text: str | None = None, speaker: str | None = None) -> Correction:
    return Correction(segment=segment, text=text, speaker=speaker, updated_at=NOW)


def spoken(*words: str, start: float = 0.0, separator: str = " ") -> Segment:
    """A segment of which each word takes a second, with flags that doubt it."""
    timed = tuple(Word(start + n, start + (n + 1), word, 0.5) for n, word in enumerate(words))
    end = start + len(words)
    return Segment(start, end, separator.join(words), -1.0, 0.0, 1.0, timed, ("low_confidence",))


def make(*segments: Segment, language: str = "en") -> Transcript:
    text = ("" if language == "ja" else " ").join(segment.text for segment in segments)
    return Transcript(text, language, segments[-1].end, segments, "faster-whisper", "tiny")


def times(segment: Segment, text: str, *, unspaced: bool = False) -> list[tuple[str, float, float]]:
    return [(w.word, w.start, w.end) for w in align(segment, text, unspaced=unspaced)]


def squeezed(text: str) -> str:
    return "".join(text.split())


TALK = make(
    spoken("Hello", "Jon."), spoken("Hello,", "Anna.", start=2), spoken("Hm.", start=4)
)  # fmt: skip

# What is put in -----------------------------------------------------------------------------------


def test_a_corrected_text_is_in_its_segment_and_in_the_whole() -> None:
    corrected = apply(TALK, [correction(0, " Hello John.\n")])
    assert corrected.text == "Hello John. Hello, Anna. Hm."
    assert corrected.segments[0].to_dict() == {
        "start": 0.0, "end": 2.0, "text": "Hello John.",
        "avg_logprob": -1.0, "no_speech_prob": 0.0, "compression_ratio": 1.0,
        "words": [
            {"start": 0.0, "end": 1.0, "word": "Hello", "probability": 0.5},
            {"start": 1.0, "end": 2.0, "word": "John.", "probability": 1.0},
        ],
        "corrected": True, "original": "Hello Jon.",
    }  # fmt: skip
    assert corrected.segments[1:] == TALK.segments[1:]
    assert TALK.segments[0].text == "Hello Jon."


def test_an_empty_text_leaves_the_segment_out_but_keeps_its_place() -> None:
    corrected = apply(TALK, [correction(2, "  ")])
    assert corrected.text == "Hello Jon. Hello, Anna."
    assert len(corrected.segments) == 3
    last = corrected.segments[2].to_dict()
    assert (last["text"], last["words"], last["original"]) == ("", [], "Hm.")
    assert "Hm" not in subtitles.srt(corrected) + subtitles.vtt(corrected) + subtitles.txt(
        corrected
    )
    assert subtitles.tsv(corrected).count("\n") == 3
    nothing = apply(TALK, [correction(n, "") for n in range(3)])
    assert [form(nothing) for form in (subtitles.txt, subtitles.srt)] == ["", ""]
    assert subtitles.vtt(nothing) == "WEBVTT\n"


def test_a_speaker_alone_changes_no_text() -> None:
    untidy = replace(TALK, text="Hello  Jon. …")
    corrected = apply(untidy, [correction(0, speaker="Anna"), correction(1, "Hello, Anna.", "Jon")])
    assert corrected.text == untidy.text
    for was, segment, speaker in zip(
        TALK.segments, corrected.segments, ("Anna", "Jon"), strict=False
    ):
        assert segment.to_dict() == was.to_dict() | {"speaker": speaker}


def test_segments_that_there_are_not_are_passed_by() -> None:
    assert apply(TALK, [correction(3, "more"), correction(-1, "less")]).to_dict() == TALK.to_dict()


def test_languages_without_spaces_are_joined_without_unless_translated() -> None:
    transcript = make(spoken("晴", "れ", separator=""), spoken("雨", start=2), language="ja")
    change = [correction(1, "雪"), correction(0, speaker="A")]
    assert apply(transcript, change).text == "晴れ雪"
    assert apply(transcript, change, task="translate").text == "晴れ 雪"


def test_without_word_times_there_are_none_afterwards() -> None:
    transcript = make(replace(spoken("Hello", "Jon."), words=None))
    (segment,) = apply(transcript, [correction(0, "Hello John.")]).segments
    assert segment.words is None
    assert "words" not in segment.to_dict()


def test_turns_are_what_one_speaker_says() -> None:
    speakers = [correction(0, speaker="A"), correction(1, "", "B"), correction(2, speaker="A")]
    assert list(turns(apply(TALK, speakers))) == [Turn("A", "Hello Jon. Hm.")]
    assert list(turns(apply(TALK, speakers[:1]))) == [
        Turn("A", "Hello Jon."), Turn(None, "Hello, Anna. Hm.")
    ]  # fmt: skip
    japanese = make(spoken("晴"), spoken("雨", start=2), language="ja")
    both = [correction(n, speaker="A") for n in range(2)]
    assert list(turns(apply(japanese, both))) == [Turn("A", "晴雨")]
    assert list(turns(apply(japanese, both, task="translate"))) == [Turn("A", "晴 雨")]


def test_a_corrected_transcript_is_read_as_it_was_written() -> None:
    corrected = apply(TALK, [correction(0, "Hello John.", "Anna"), correction(1, speaker="Jon")])
    read = read_transcript(json.loads(subtitles.as_json(corrected)))
    assert read.to_dict() == corrected.to_dict()
    assert read.segments == corrected.segments
    assert [type(segment) for segment in read.segments] == [
        CorrectedSegment, CorrectedSegment, Segment
    ]  # fmt: skip


def test_a_fingerprint_tells_corrections_apart() -> None:
    different: list[list[Correction]] = [
        [], [correction(0, "a")], [correction(1, "a")], [correction(0, "b")], [correction(0, "")],
        [correction(0, speaker="a")], [correction(0, "a", "b")],
        [correction(0, "a"), correction(1, "a")],
    ]  # fmt: skip
    assert len({fingerprint(found) for found in different}) == len(different)
    assert fingerprint([]) == ""
    later = correction(0, "a").model_copy(update={"updated_at": datetime.now(UTC)})
    assert fingerprint([later]) == fingerprint(different[1])


# Word times ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("was", "text", "expected"),
    [
        ("a b c", "a B, c", [("a", 0, 1), ("B,", 1, 2), ("c", 2, 3)]),
        ("a bb c", "a x c", [("a", 0, 1), ("x", 1, 2), ("c", 2, 3)]),
        ("a b c", "a c", [("a", 0, 1), ("c", 2, 3)]),
        ("a b c", "b", [("b", 1, 2)]),
        ("a b", "a x y z b", [("a", 0, 1), ("x", 1, 1), ("y", 1, 1), ("z", 1, 1), ("b", 1, 2)]),
        ("a cannot b", "a can not b", [("a", 0, 1), ("can", 1, 1.5), ("not", 1.5, 2), ("b", 2, 3)]),
        ("x y", "a b c d", [("a", 0, 0.5), ("b", 0.5, 1), ("c", 1, 1.5), ("d", 1.5, 2)]),
        ("a b c d", "b xxx yz", [("b", 1, 2), ("xxx", 2, 3), ("yz", 3, 4)]),
    ],
)
def test_words_have_the_times_of_those_whose_place_they_take(
    was: str, text: str, expected: list[tuple[str, float, float]]
) -> None:
    assert times(spoken(*was.split()), text) == expected


def test_words_put_into_a_pause_share_it() -> None:
    first, last = spoken("a").words, spoken("b", start=4).words
    assert first
    assert last
    segment = Segment(0, 6, "a b", 0, 0, 0, first + last)
    assert times(segment, "a x yy b z") == [
        ("a", 0, 1), ("x", 1, 2), ("yy", 2, 4), ("b", 4, 5), ("z", 5, 6)
    ]  # fmt: skip


def test_what_the_engine_divides_is_one_word_as_it_stands_in_the_text() -> None:
    segment = replace(spoken("a", "well", "-known", "man"), text="a well-known man")
    assert times(segment, "the well-known man") == [
        ("the", 0, 1), ("well-known", 1, 3), ("man", 3, 4)
    ]  # fmt: skip


def test_without_spaces_words_are_aligned_by_characters() -> None:
    segment = spoken("今日", "は", "良い", "天気", "です。", separator="")
    assert times(segment, "今日は悪い天気です。", unspaced=True) == [
        ("今日", 0, 1), ("は", 1, 2), ("悪", 2, 2.5), ("い", 2.5, 3),
        ("天気", 3, 4), ("です。", 4, 5),
    ]  # fmt: skip
    assert [word for word, *_ in times(segment, "今日New Yorkは天気", unspaced=True)] == [
        "今日", "New", "York", "は", "天気"
    ]  # fmt: skip
    thai = spoken("สวัสดี", "ครับ", separator="")
    assert times(thai, "สวัสดีค่ะ", unspaced=True)[0] == ("สวัสดี", 0, 1)


def test_a_text_that_has_grown_out_of_its_words_is_spread_over_the_segment() -> None:
    text = " ".join(["a"] * 5000)
    found = times(spoken("a", "b"), text)
    assert [word for word, *_ in found] == text.split()
    assert found[0][1:] == pytest.approx((0, 2 / 5000))
    assert found[-1][1:] == pytest.approx((2 - 2 / 5000, 2))


def test_one_word_again_and_again_is_spread_over_the_segment_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[int] = []

    def watched(**texts: Any) -> SequenceMatcher[str]:
        compared.append(len(texts["a"]) * len(texts["b"]))
        return SequenceMatcher(**texts)

    monkeypatch.setattr(alignment, "SequenceMatcher", watched)
    text = " ".join(["the"] * 400)
    found = times(spoken(*["the"] * 120), text)
    assert [word for word, *_ in found] == text.split()
    assert found[-1][1:] == pytest.approx((120 - 120 / 400, 120))
    assert compared == []
    assert times(spoken("the", "sea"), "The cold sea")[0][0] == "The"
    assert compared == [6]


LETTERS = "aàbBc1.,'-—の今ーはกำ้é\u0301ि "
texts = st.text(LETTERS + "\n", max_size=60) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20
)
seconds = st.floats(-1, 60, allow_nan=False)
words = st.lists(
    st.builds(Word, seconds, seconds, st.text(LETTERS, max_size=6).map(str.strip), st.floats(0, 1)),
    max_size=12,
)


@given(words, texts, seconds, seconds, st.booleans(), st.booleans())
def test_times_rise_within_the_segment_and_no_text_is_lost(
    engine: list[Word],
    text: str,
    start: float,
    end: float,
    unspaced: bool,  # noqa: FBT001
    separate: bool,  # noqa: FBT001
) -> None:
    was = (" " if separate else "").join(word.word for word in engine)
    segment = Segment(start, end, was, 0, 0, 0, tuple(engine))
    found = align(segment, text, unspaced=unspaced)
    assert "".join(word.word for word in found) == squeezed(text)
    if not unspaced:
        assert [word.word for word in found] == text.split()
    assert all(start <= word.start <= word.end <= max(start, end) for word in found)
    assert all(left.end <= right.start for left, right in pairwise(found))
    assert all(0 <= word.probability <= 1 for word in found)


@st.composite
def edits(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    """Distinct words, and some of them in order with others in between."""
    original = [f"w{n}" for n in range(draw(st.integers(1, 12)))]
    edited = list[str]()
    for word in original:
        edited += [f"x{len(edited)}" for _ in range(draw(st.integers(0, 2)))]
        edited += [word] * draw(st.integers(0, 1))
    return original, edited


@given(edits(), st.floats(0, 3600))
def test_kept_words_keep_their_times_and_probabilities(
    edit: tuple[list[str], list[str]], start: float
) -> None:
    original, edited = edit
    segment = spoken(*original, start=start)
    by_word = {word.word: word for word in segment.words or ()}
    found = align(segment, " ".join(edited), unspaced=False)
    assert [word.word for word in found] == edited
    for word in found:
        assert word == by_word.get(word.word, replace(word, probability=1.0))


@given(st.lists(st.sampled_from(["今日", "は", "良い", "天気", "です"]), max_size=8))
def test_an_unchanged_text_has_its_words_in_any_language(original: list[str]) -> None:
    for separator, unspaced in ((" ", False), ("", True)):
        segment = spoken(*original, separator=separator)
        assert align(segment, segment.text, unspaced=unspaced) == segment.words


corrections = st.lists(
    st.builds(
        correction,
        st.integers(0, 3),
        st.none() | st.text("ab .", max_size=12),
        st.none() | st.sampled_from(["Anna", "Bob & <Co>", "a: b"]),
    ),
    max_size=4,
    unique_by=lambda found: found.segment,
)


@given(corrections)
def test_every_form_has_the_corrected_text(found: list[Correction]) -> None:
    corrected = apply(TALK, found)
    document: dict[str, Any] = json.loads(subtitles.as_json(corrected))
    expected = [
        segment.text if (text := changed.get(place)) is None else text.strip()
        for changed in [{c.segment: c.text for c in found}]
        for place, segment in enumerate(TALK.segments)
    ]
    assert [segment["text"] for segment in document["segments"]] == expected
    assert document["text"].split() == " ".join(expected).split()
    cues = subtitles.cues(corrected)
    assert squeezed("".join("".join(cue.lines) for cue in cues)) == squeezed("".join(expected))
