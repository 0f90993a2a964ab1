"""Subtitles: nothing lost, nothing doubled, readable, and what other programs can read."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import groupby, pairwise
from types import FrameType

import pytest
import srt
import webvtt
from hypothesis import given
from hypothesis import strategies as st

from jobs import subtitles
from jobs.corrections import CorrectedSegment, speaker_of
from jobs.models import Segment, Transcript, Word
from jobs.subtitles import Cue, Layout, cells, cues


def make(*segments: Segment, duration: float | None = None, language: str = "en") -> Transcript:
    text = " ".join(segment.text for segment in segments)
    length = duration if duration is not None else max((s.end for s in segments), default=0.0)
    return Transcript(text, language, length, segments, "faster-whisper", "tiny")


def spoken(text: str, start: float = 0.0, *, pace: float = 0.07) -> Segment:
    """A segment with word times; a word takes as long as it is long."""
    words, time = [], start
    for word in text.split():
        end = time + pace * (len(word) + 1)
        words.append(Word(time, end, word, 1.0))
        time = end
    return Segment(start, time, text, 0.0, 0.0, 0.0, tuple(words))


def plain(text: str, start: float, end: float) -> Segment:
    return Segment(start, end, text, 0.0, 0.0, 0.0)


def squeezed(text: str) -> str:
    return "".join(text.split())


def shown(found: list[Cue]) -> str:
    return squeezed("".join("".join(cue.lines) for cue in found))


LONG = (
    "For many years, the keepers had written down everything they saw, and when the last of them "
    "left, nobody wanted to throw the heavy books away."
)

# Properties -------------------------------------------------------------------------------------

texts = st.text(
    st.one_of(
        st.sampled_from("aaabc eeE  \n.,!?'\"-–()<>&:0123"),  # noqa: RUF001
        st.sampled_from("天気です。、「」オーกำ้ပါ한국어é\u0301\u200d👍🏽"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=150,
)
seconds = st.floats(-1, 400, allow_nan=False)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    text, start, end = draw(texts), draw(seconds), draw(seconds)
    speaker = draw(st.sampled_from([None, None, "Anna", "Bob & <Co>", "x" * 70]))
    words = None
    if draw(st.booleans()):
        cut = draw(st.sampled_from([text.split(), list(text), [text, "more"]]))
        words = tuple(Word(draw(seconds), draw(seconds), word, 1.0) for word in cut[:30])
    return CorrectedSegment(start, end, text, 0.0, 0.0, 0.0, words, (), speaker)


layouts = st.builds(
    Layout, st.none() | st.integers(10, 60), st.none() | st.integers(1, subtitles.MAX_LINES)
)
transcripts = st.builds(
    lambda parts, duration: make(*parts, duration=duration),
    st.lists(segments(), max_size=6),
    st.floats(0, 400),
)


@given(transcripts, layouts)
def test_no_text_is_lost_or_doubled(transcript: Transcript, layout: Layout) -> None:
    found = cues(transcript, layout)
    assert shown(found) == squeezed(transcript.text)
    assert all(line.strip() for cue in found for line in cue.lines)
    assert all(cue.lines for cue in found)


@given(transcripts, layouts)
def test_times_rise_and_stay_within_the_recording(transcript: Transcript, layout: Layout) -> None:
    found = cues(transcript, layout)
    limit = max(transcript.duration * 1000, 2 * len(found))
    assert all(0 <= cue.start < cue.end <= limit for cue in found)
    assert all(cue.end - cue.start <= layout.max_duration for cue in found)
    assert all(a.end < b.start for a, b in pairwise(found))
    if transcript.duration * 1000 >= 200 * len(found):
        assert all(b.start - a.end >= layout.min_gap for a, b in pairwise(found))


@given(transcripts, layouts)
def test_lines_keep_to_the_limits(transcript: Transcript, layout: Layout) -> None:
    for cue in cues(transcript, layout):
        assert len(cue.lines) <= (layout.max_lines or 2)
        for line in cue.lines:
            # Marks on a character take no cell of their own, and are not torn from it.
            assert cells(line) <= (layout.max_line_length or 42)


@given(transcripts, layouts, st.booleans())
def test_no_cue_has_the_words_of_two_speakers(
    transcript: Transcript,
    layout: Layout,
    labels: bool,  # noqa: FBT001
) -> None:
    said = [
        (speaker, squeezed("".join(segment.text for segment in segments)))
        for speaker, segments in groupby(
            (segment for segment in transcript.segments if segment.text.strip()), speaker_of
        )
    ]
    found = [
        (speaker, shown(list(cues)))
        for speaker, cues in groupby(
            cues(transcript, layout, labels=labels), lambda cue: cue.speaker
        )
    ]
    names = {speaker: squeezed(f"{speaker}:") for speaker, _ in said if speaker and labels}
    assert found == [(speaker, names.get(speaker or "", "") + text) for speaker, text in said]


@given(transcripts, layouts)
def test_lines_keep_to_the_limits_with_labels(transcript: Transcript, layout: Layout) -> None:
    for cue in cues(transcript, layout, labels=True):
        assert len(cue.lines) <= (layout.max_lines or 2)
        assert all(0 < cells(line) <= (layout.max_line_length or 42) for line in cue.lines)


printable = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), min_size=1, max_size=80
)


@given(st.lists(printable.filter(squeezed), min_size=1, max_size=4))
def test_other_readers_find_the_same_cues(parts: list[str]) -> None:
    transcript = make(*(plain(part, n * 3.0, n * 3.0 + 3) for n, part in enumerate(parts)))
    expected = cues(transcript)
    read = list(srt.parse(subtitles.srt(transcript)))
    assert [squeezed(c.content) for c in read] == [squeezed("".join(c.lines)) for c in expected]
    assert [(c.start, c.end) for c in read] == [
        (timedelta(milliseconds=c.start), timedelta(milliseconds=c.end)) for c in expected
    ]
    captions = webvtt.from_string(subtitles.vtt(transcript)).captions
    assert [squeezed(unescaped(c.raw_text)) for c in captions] == [
        squeezed("".join(c.lines)) for c in expected
    ]
    assert [(c.start, c.end) for c in captions] == [
        (clock(c.start), clock(c.end)) for c in expected
    ]


def clock(milliseconds: int) -> str:
    return (datetime(1, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)).strftime(
        "%H:%M:%S.%f"
    )[:-3]


def unescaped(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


# How it looks -----------------------------------------------------------------------------------


def test_a_long_sentence_is_cut_at_its_joints() -> None:
    found = [cue.lines for cue in cues(make(spoken(LONG)))]
    assert found == [
        ("For many years, the keepers had", "written down everything they saw,"),
        ("and when the last of them left, nobody", "wanted to throw the heavy books away."),
    ]


def test_cues_follow_the_words_times() -> None:
    segment = spoken(LONG, 5.0)
    assert segment.words is not None
    first, second = cues(make(segment, duration=60))
    assert first.start == 5000
    assert second.start == round(
        next(word.start for word in segment.words if word.word == "and") * 1000
    )
    assert first.end == second.start - 80, "what follows at once leaves two frames"


def test_without_word_times_the_text_is_spread_over_the_segment() -> None:
    first, second = cues(make(plain(LONG, 10, 20)))
    assert first.start == 10_000
    assert second.start == pytest.approx(14_600, abs=300)
    assert second.end == 20_000


def test_words_that_do_not_fit_the_text_are_left_alone() -> None:
    segment = Segment(0, 4, "Two words.", 0, 0, 0, (Word(0, 1, "Three", 1), Word(1, 2, "wor", 1)))
    assert cues(make(segment)) == [Cue(0, 4000, ("Two words.",))]


def test_short_neighbours_share_a_cue() -> None:
    answers = [spoken(text, 0.4 * n, pace=0.08) for n, text in enumerate(["Yes.", "No.", "So."])]
    assert [cue.lines for cue in cues(make(*answers, duration=9))] == [("Yes. No. So.",)]


def test_sentences_with_time_stand_alone_and_stay_long_enough_to_be_read() -> None:
    found = cues(make(spoken("Yes."), spoken("No, I have not.", 4.0), duration=10))
    assert [(cue.start, cue.end, cue.lines) for cue in found] == [
        (0, 1000, ("Yes.",)),
        (4000, 5120, ("No, I have not.",)),
    ]


def test_no_cue_goes_on_over_a_long_pause() -> None:
    words = (Word(0, 0.5, "Well", 1), Word(6, 6.5, "perhaps.", 1))
    found = cues(make(Segment(0, 6.5, "Well perhaps.", 0, 0, 0, words), duration=9))
    assert [(cue.start, cue.end) for cue in found] == [(0, 1000), (6000, 7000)]


def test_reading_speed_is_kept_where_the_speech_leaves_the_time() -> None:
    fast = [spoken(LONG, 10.0 * n, pace=0.03) for n in range(3)]
    for cue in cues(make(*fast, duration=40))[1::2]:  # the first halves have the second behind them
        assert sum(map(len, cue.lines)) / (cue.end - cue.start) * 1000 == pytest.approx(17, abs=0.1)


def test_lines_do_not_end_with_an_article() -> None:
    text = "She would have liked to see the beautiful island of her childhood, the harbour."
    for cue in cues(make(spoken(text))):
        assert not any(line.endswith((" the", " of", " to")) for line in cue.lines)


def test_full_width_text_has_one_line_of_sixteen() -> None:
    text = "今日はとても良い天気ですね。明日は雨が降るかもしれませんが、私たちは散歩に行きます。"
    found = cues(make(plain(text, 0, 12), language="ja"))
    assert [cue.lines for cue in found] == [
        ("今日はとても良い天気ですね。",),
        ("明日は雨が降るかもしれませんが、",),
        ("私たちは散歩に行きます。",),
    ]


def test_marks_stay_with_their_characters() -> None:
    text = "e\u0301" * 60
    found = cues(make(plain(text, 0, 10)), Layout(max_line_length=11))
    assert all(line[0] == "e" for cue in found for line in cue.lines)


def test_hours_may_have_three_digits() -> None:
    transcript = make(plain("Late.", 360_000.5, 360_002), duration=400_000)
    assert "100:00:00,500 --> 100:00:02,000" in subtitles.srt(transcript)
    assert [cue.start for cue in srt.parse(subtitles.srt(transcript))] == [
        timedelta(hours=100, milliseconds=500)
    ]
    assert "100:00:00.500 --> 100:00:02.000" in subtitles.vtt(transcript)


# Formats ----------------------------------------------------------------------------------------


def test_srt() -> None:
    transcript = make(spoken("Yes."), spoken("He said --> no.", 4.0), duration=10)
    assert subtitles.srt(transcript) == (
        "1\n00:00:00,000 --> 00:00:01,000\nYes.\n\n"
        "2\n00:00:04,000 --> 00:00:05,120\nHe said -- > no.\n"
    )


def test_vtt_escapes_its_own_marks() -> None:
    transcript = make(plain("a<b> & c --> d", 0, 2))
    assert subtitles.vtt(transcript) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\na&lt;b&gt; &amp; c --&gt; d\n"
    )


def test_tsv_is_whispers() -> None:
    transcript = make(plain("One\ttwo.", 0, 1.5), plain("Three.", 1.5, 2.25))
    assert subtitles.tsv(transcript) == "start\tend\ttext\n0\t1500\tOne two.\n1500\t2250\tThree.\n"


def test_txt_and_json() -> None:
    transcript = make(plain("Größe.", 0, 1.5))
    assert subtitles.txt(transcript) == "Größe.\n"
    assert Transcript.from_dict(json.loads(subtitles.as_json(transcript))) == transcript


def test_nothing_said() -> None:
    empty = make(duration=3)
    assert cues(empty) == []
    assert [subtitles.FORMATS[name](empty, Layout()) for name in ("txt", "srt", "vtt")] == [
        "", "", "WEBVTT\n"
    ]  # fmt: skip


def test_text_without_segments_is_shown_all_the_same() -> None:
    found = cues(Transcript("Only text.", "en", 3.0, (), "e", "m"))
    assert found == [Cue(0, 3000, ("Only text.",))]


def test_long_transcripts_take_time_in_proportion() -> None:
    """A cut looks at what one cue can hold, however long the transcript is."""
    parts = [spoken(LONG, 20.0 * n) for n in range(500)]
    found = cues(make(*parts, duration=math.ceil(20 * 500)))
    assert len(found) == 1000


def calls_of(function: Callable[[], object]) -> int:
    """Count the calls, of Python's own functions as well: a measure that no machine changes."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize(
    ("start", "more"),
    [
        ("a" * 43, "\u200b"),  # fills no line
        ("a" * 43, "e\u0301"),
        ("", "\u200b "),
        ("", "a "),
        ("", "天\u200b"),
        ("", "天"),
        ("", "a. "),
    ],
)
@pytest.mark.parametrize("layout", [Layout(), Layout(200, 4)])
def test_no_text_takes_more_than_in_proportion(start: str, more: str, layout: Layout) -> None:
    short, long = (make(plain(start + more * n, 0, 5)) for n in (500, 1000))
    few, many = (calls_of(partial(cues, transcript, layout)) for transcript in (short, long))
    assert many < 2.1 * few
    assert many < 600 * 1000


# Speakers ---------------------------------------------------------------------------------------


def by(speaker: str | None, segment: Segment) -> CorrectedSegment:
    values = {part.name: getattr(segment, part.name) for part in fields(Segment)}
    return CorrectedSegment(**values, speaker=speaker)


TALK = make(
    by("Anna", spoken("Yes.")),
    by("Anna", spoken("No.", 2.0)),
    by("Bob & <Co>", spoken("So what?", 4.0)),
    by(None, spoken("Hm.", 6.0)),
    by("Anna", spoken("Well.", 8.0)),
    duration=10,
)


def test_srt_names_who_begins_to_speak() -> None:
    assert [cue.content for cue in srt.parse(subtitles.srt(TALK))] == [
        "Anna: Yes.", "No.", "Bob & <Co>: So what?", "Hm.", "Anna: Well."
    ]  # fmt: skip


def test_vtt_has_voices() -> None:
    found = subtitles.vtt(TALK)
    assert "\n<v Anna>Yes.\n" in found
    assert "\n<v Bob &amp; &lt;Co&gt;>So what?\n" in found
    captions = webvtt.from_string(found).captions
    assert [(unescaped(c.voice or ""), c.text) for c in captions] == [
        ("Anna", "Yes."), ("Anna", "No."), ("Bob & <Co>", "So what?"), ("", "Hm."),
        ("Anna", "Well."),
    ]  # fmt: skip


def test_txt_has_a_paragraph_for_each_turn() -> None:
    assert subtitles.txt(TALK) == ("Anna: Yes. No.\n\nBob & <Co>: So what?\n\nHm.\n\nAnna: Well.\n")


def test_tsv_has_whispers_columns_and_names_who_speaks_in_each_row() -> None:
    rows = [row.split("\t") for row in subtitles.tsv(TALK).splitlines()]
    assert rows[0] == ["start", "end", "text"]
    assert [row[2] for row in rows[1:]] == [
        "Anna: Yes.", "Anna: No.", "Bob & <Co>: So what?", "Hm.", "Anna: Well."
    ]  # fmt: skip


def test_a_name_stands_with_the_words_and_counts_in_the_line() -> None:
    found = cues(make(by("Anna Maria", spoken(LONG))), labels=True)
    assert found[0].lines[0].startswith("Anna Maria: For many years")
    assert all(cells(line) <= 42 for cue in found for line in cue.lines)
    assert "Anna" not in shown(found[1:])


def test_short_neighbours_of_two_speakers_share_no_cue() -> None:
    answers = [by(name, spoken("Yes.", 0.4 * n, pace=0.08)) for n, name in enumerate("ABB")]
    found = cues(make(*answers, duration=9))
    assert [(cue.speaker, cue.lines) for cue in found] == [("A", ("Yes.",)), ("B", ("Yes. Yes.",))]
