from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modal_functions.audio import SAMPLE_RATE, Samples, decode
from modal_functions.plan import Span
from modal_functions.splitting import MAX_SECONDS, MIN_SECONDS, split

PAUSE = 0.3  # seconds that count as one
NEAR_EDGE = 0.05  # seconds: cuts are at multiples of 20 ms
VOICE = -20.0  # dBFS

Piece = tuple[float, float]  # seconds, and dBFS


def gain(decibels: float) -> np.float32:
    return np.float32(10 ** (decibels / 20))


def noise(seconds: float, decibels: float) -> Samples:
    """White noise, the hiss of a room."""
    random = np.random.default_rng(int(seconds * 1000))
    return random.standard_normal(round(seconds * SAMPLE_RATE), np.float32) * gain(decibels)


def tone(seconds: float, decibels: float) -> Samples:
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return np.sin(2 * np.pi * 440 * times).astype(np.float32) * gain(decibels + 3)


def voice(seconds: float, decibels: float = VOICE) -> Samples:
    """Make noise that comes and goes four times a second as syllables do, starting loud."""
    times = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    syllables = 1.02 + np.cos(2 * np.pi * 4 * times)
    return noise(seconds, decibels) * syllables.astype(np.float32)


def talk(pieces: list[Piece], hiss: float, level: float = VOICE) -> tuple[Samples, list[Piece]]:
    """Speak and pause in turns; return the samples and when the pauses begin and end."""
    sounds, pauses, position = [], [], 0.0
    for speech, pause in pieces:
        sounds += [voice(speech, level), np.zeros(round(pause * SAMPLE_RATE), np.float32)]
        pauses.append((position + speech, position + speech + pause))
        position += speech + pause
    samples = np.concatenate(sounds)
    return samples + noise(len(samples) / SAMPLE_RATE, hiss)[: len(samples)], pauses


def as_pcm(samples: Samples) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    return np.clip(np.rint(samples * 2**15), -(2**15), 2**15 - 1).astype(np.int16)


def check(spans: list[Span], samples: int, shortest: float, longest: float) -> None:
    """Check what holds for every recording: each sample once, in order, within the bounds."""
    assert [spans[0].start, *(span.end for span in spans)] == [
        *(span.start for span in spans),
        samples,
    ]
    lengths = [(span.end - span.start) / SAMPLE_RATE for span in spans]
    assert max(lengths) <= longest
    assert len(spans) == 1 or min(lengths) >= shortest


def depth(time: float, pauses: list[Piece]) -> float:
    """Return how far inside a pause a time is, in seconds, or less than 0."""
    return max((min(time - start, end - time) for start, end in pauses), default=-1.0)


def reachable(span: Span, pauses: list[Piece], total: float, bounds: Piece) -> float:
    """Return the length of the longest stretch of a pause in which a span might have ended."""
    earliest = span.seconds[0] + bounds[0] + NEAR_EDGE
    latest = min(span.seconds[0] + bounds[1], total - bounds[0]) - NEAR_EDGE
    return max((min(end, latest) - max(start, earliest) for start, end in pauses), default=-1.0)


def spoken(span: Span, pauses: list[Piece], longest: float) -> float:
    """Return how many seconds of speech there are where a span might have ended, and before."""
    first, last = span.seconds[0], min(span.seconds[0] + longest, pauses[-1][1])
    return last - first - sum(max(0, min(e, last) - max(s, first)) for s, e in pauses)


seconds = st.integers(0, 300).map(lambda hundredths: hundredths / 100)
TALKS = st.lists(st.tuples(seconds.map(lambda s: s + 0.1), seconds), min_size=1, max_size=25)
BOUNDS = st.tuples(st.floats(0.5, 3), st.floats(2.1, 4)).map(lambda b: (b[0], b[0] * b[1]))

# The pause of 0.3 s starts and ends within a frame: it has fourteen whole ones, not fifteen.
WITHIN_FRAMES = [(0.1, 0.0), (0.11, 2.05), (0.36, 3.0), (2.09, 0.3), (0.1, 0.45)]


@settings(max_examples=60)
@given(TALKS, BOUNDS, st.sampled_from([-90.0, -60.0, -45.0]))
@example(WITHIN_FRAMES, (0.5, 1.25), -90.0)
def test_cuts_are_in_pauses_where_there_are_some(
    pieces: list[Piece], bounds: Piece, hiss: float
) -> None:
    samples, pauses = talk(pieces, hiss)
    total = len(samples) / SAMPLE_RATE
    spans = split(samples, min_seconds=bounds[0], max_seconds=bounds[1])
    check(spans, len(samples), *bounds)
    for span in spans[:-1]:
        longest = reachable(span, pauses, total, bounds)
        if longest >= PAUSE and spoken(span, pauses, bounds[1]) > PAUSE:
            assert span.pause_after
            assert depth(span.seconds[1], pauses) >= longest / 2 - NEAR_EDGE
    assert spans[-1].pause_after


@settings(max_examples=30)
@given(TALKS, BOUNDS, st.sampled_from([0.0, -30.0]))
def test_whole_numbers_are_divided_as_fractions_are(
    pieces: list[Piece], bounds: Piece, louder: float
) -> None:
    pcm = as_pcm(talk(pieces, -60)[0] * gain(louder))
    fractions = (pcm / 2**15).astype(np.float32)
    limits = {"min_seconds": bounds[0], "max_seconds": bounds[1]}
    assert split(pcm, **limits) == split(fractions, **limits)


@settings(max_examples=50)
@given(st.integers(0, 200_000), BOUNDS)
def test_any_length_of_anything_is_covered(samples: int, bounds: Piece) -> None:
    for sound in (np.zeros(samples, np.int16), np.full(samples, 2**15 - 1, np.int16)):
        spans = split(sound, min_seconds=bounds[0], max_seconds=bounds[1])
        if samples:
            check(spans, samples, *bounds)
        else:
            assert spans == []


@pytest.mark.parametrize("extra", [0, 1, 319, 320, 321, 16_000])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_maximum_of_twice_the_minimum_is_enough(times: int, extra: int) -> None:
    samples = voice(10)[: times * 2 * SAMPLE_RATE + extra]
    check(split(samples, min_seconds=1, max_seconds=2), len(samples), 1, 2)


def test_the_longest_pause_wins() -> None:
    samples, _ = talk([(35, 0.5), (10, 1.5), (10, 0.8), (30, 0.5), (50, 0)], -60)
    first = split(samples)[0]
    assert first.seconds[1] == pytest.approx(35 + 0.5 + 10 + 0.75, abs=NEAR_EDGE)


@pytest.mark.parametrize("length", [0.01, 20, 90])
def test_short_recordings_are_one_span(length: float) -> None:
    samples = voice(length)
    assert split(samples) == [Span(0, len(samples))]


@pytest.mark.parametrize("length", [90.1, 110, 119.9, 200])
def test_what_is_left_is_shared_and_not_dropped(length: float) -> None:
    samples, pauses = talk([(4, 0.5)] * 20 + [(length - 90, 0)], -60)
    spans = split(samples)
    check(spans, len(samples), MIN_SECONDS, MAX_SECONDS)
    assert depth(spans[0].seconds[1], pauses) > 0


@pytest.mark.parametrize(
    "sound",
    [
        pytest.param(lambda: tone(1800, -14), id="tone"),
        pytest.param(lambda: noise(1800, -20), id="noise"),
        pytest.param(lambda: voice(1800), id="speech"),
        pytest.param(lambda: voice(1800) + tone(1800, -14), id="speech over a tone"),
        pytest.param(lambda: tone(1800, -14) + np.float32(0.3), id="tone with an offset"),
    ],
)
def test_half_an_hour_without_a_pause_is_divided(sound: Callable[[], Samples]) -> None:
    pcm = as_pcm(sound())
    spans = split(pcm)
    check(spans, len(pcm), MIN_SECONDS, MAX_SECONDS)
    assert not any(span.pause_after for span in spans[:-1])
    assert len(spans) <= 1 + 1800 / (MAX_SECONDS - 10)


def test_without_a_pause_the_quietest_place_near_the_maximum_is_taken() -> None:
    faint = [(86.0, 0.2), (30.0, 0.2), (30.0, 0.0)]  # a stop between two words, no pause
    samples, stops = talk(faint, -60)
    spans = split(samples)
    assert not spans[0].pause_after
    assert depth(spans[0].seconds[1], stops) > 0


@pytest.mark.parametrize("loud", [tone, noise])
def test_loud_and_steady_is_not_a_pause(loud: Callable[[float, float], Samples]) -> None:
    speech, pauses = talk([(4, 0.6)] * 7, -60)
    music = loud(40, -14)
    samples = np.concatenate([music, speech, music, speech, music])
    shift = [40, 40 + len(speech) / SAMPLE_RATE + 40]
    real = [(start + by, end + by) for by in shift for start, end in pauses]
    spans = split(samples)
    check(spans, len(samples), MIN_SECONDS, MAX_SECONDS)
    for span in spans[:-1]:
        assert span.pause_after == (depth(span.seconds[1], real) > 0)
    assert any(span.pause_after for span in spans[:-1])


@pytest.mark.parametrize("quieter", [15, 30])
def test_quiet_speech_is_not_a_pause(quieter: float) -> None:
    """Somebody far from the microphone answers at length, between two who are near."""
    near, near_pauses = talk([(5, 0.4)] * 6, -75)
    far, far_pauses = talk([(5, 0.4)] * 6, -75, VOICE - quieter)
    samples = np.concatenate([near, far, near])
    length = len(near) / SAMPLE_RATE
    pauses = [
        (start + by * length, end + by * length)
        for by, some in enumerate((near_pauses, far_pauses, near_pauses))
        for start, end in some
    ]
    for span in split(samples)[:-1]:
        assert depth(span.seconds[1], pauses) > 0.1


def test_pauses_in_a_noisy_room_are_found() -> None:
    samples, pauses = talk([(5, 0.6)] * 40, VOICE - 12)
    spans = split(samples)
    assert all(span.pause_after for span in spans)
    assert all(depth(span.seconds[1], pauses) > 0.2 for span in spans[:-1])


def test_a_silent_stretch_is_all_pause() -> None:
    samples = np.concatenate([voice(20), noise(200, -75), voice(20)])
    spans = split(samples)
    assert all(span.pause_after for span in spans)
    assert all(20 < span.seconds[1] < 220 for span in spans[:-1])


def test_sentences_of_real_speech_stay_whole(sample: Path, sample_text: str) -> None:
    samples = decode(str(sample), max_seconds=60)
    spans = split(samples, min_seconds=4, max_seconds=12)
    powers = [np.square(samples[s.end - 1600 : s.end + 1600]).mean() for s in spans[:-1]]
    assert all(span.pause_after for span in spans)
    assert 10 * np.log10(max(powers)) < -55
    assert len(spans) <= sample_text.count(".")


@pytest.mark.parametrize(("shortest", "longest"), [(0, 10), (-1, 10), (10, 19.9), (10, 5)])
def test_bounds_that_cannot_be_kept_are_refused(shortest: float, longest: float) -> None:
    with pytest.raises(ValueError, match="at least twice"):
        split(voice(1), min_seconds=shortest, max_seconds=longest)
