"""The transcripts of a recording's spans to that of the whole.

The spans cover each sample exactly once, so no word can come twice or get lost at a seam, and
nothing is compared there: where both sides of a seam have the same word, it was said twice.

Where a span had to end without a pause, the cut is at the quietest place near, mostly between two
words or in the stop of a consonant. At worst it leaves one word as two halves. Overlapping spans
would need word times to be aligned, pay for the overlap on every engine, and fail in their own
ways (repeated words, two readings of one word). A recording without a pause of 0.3 s in the whole
of a window is rare enough to accept the half word.

Each span's language is detected on its own unless the options name one, as the spans are
transcribed at the same time: a recording in two languages is better off, and a span that is taken
for another language is the price. The whole is said to be in the language of most of the speech.
For the same reason every span gets the options' initial prompt, and none the text before it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Final

from modal_functions.doubts import flag_doubtful
from modal_functions.errors import NoSpeech
from modal_functions.transcript import Segment, Transcript, Word, join_text

# When its span starts and ends in the recording, in seconds, and its transcript in its own times.
Part = tuple[tuple[float, float], Transcript]

_TOLERANCE: Final = 0.01  # seconds by which times may suffer on their way through a database


def merge(parts: Sequence[Part], *, name: str, task: str = "transcribe") -> Transcript:
    """Merge the transcripts of all of a recording's spans, in order, and flag what is doubtful.

    Parts without speech are fine as long as one has some, otherwise NoSpeech is raised, calling
    the recording `name`. `task` is that of the options. Raises ValueError where the spans do not
    follow each other from the start, as a part that is missing would go unnoticed.
    """
    _check_order([times for times, _ in parts])
    spoken = [part for part in parts if part[1].has_speech]
    if not spoken:
        raise no_speech(name)
    language = _language(transcript for _, transcript in spoken)
    return Transcript(
        text=join_text((transcript.text for _, transcript in spoken), language=language, task=task),
        language=language,
        duration=parts[-1][0][1],
        segments=flag_doubtful(list(_segments(spoken))),
        engine=spoken[0][1].engine,
        model=spoken[0][1].model,
    )


def no_speech(name: str) -> NoSpeech:
    """Return the error for a recording in which the engine heard nobody speak."""
    return NoSpeech(
        f"No speech was found in {name}. If there is some, set options.language, or "
        "options.preprocessing for quiet speech."
    )


def _check_order(spans: Sequence[tuple[float, float]]) -> None:
    starts_late = not spans or spans[0][0] > _TOLERANCE
    if starts_late or any(
        abs(end - start) > _TOLERANCE for (_, end), (start, _) in pairwise(spans)
    ):
        raise ValueError("the parts must cover the recording, in order")


def _language(transcripts: Iterable[Transcript]) -> str:
    """Return the language spoken for the longest time; of equals, the first."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for transcript in transcripts:
        seconds[transcript.language] += sum(s.end - s.start for s in transcript.segments)
    return max(seconds, key=seconds.__getitem__)


def _segments(parts: Iterable[Part]) -> Iterator[Segment]:
    """Yield the parts' segments in the recording's times, which never go back."""
    after = 0.0
    for (offset, latest), transcript in parts:
        after = max(after, offset)
        for segment in transcript.segments:
            start, end = _within(segment, offset, after, latest)
            words = segment.words
            if words is not None:
                words = tuple(_words(words, offset, start, end))
            yield replace(segment, start=start, end=end, words=words)
            after = end


def _words(words: Iterable[Word], offset: float, after: float, latest: float) -> Iterator[Word]:
    for word in words:
        start, after = _within(word, offset, after, latest)
        yield replace(word, start=start, end=after)


def _within(
    piece: Segment | Word, offset: float, earliest: float, latest: float
) -> tuple[float, float]:
    """Return the piece's times in the recording, moved to where it may be."""
    start = min(max(piece.start + offset, earliest), latest)
    return start, min(max(piece.end + offset, start), latest)
