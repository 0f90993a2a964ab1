"""Which segments of a transcript to doubt, so that a reader knows where to listen again.

- `repetition`: the text repeats itself, by Whisper's own measure or because the same sentence
  comes three times, or a short word eight times, in a row: within a segment, or over several that
  are too short for that measure. Whisper does that when it loses the thread.
- `low_confidence`: Whisper would have tried again at a higher temperature, and ran out of them.
- `no_speech`: Whisper believes that nobody spoke, and is not sure of the words either. It drops
  such a text by itself only where it is very unsure of them.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Final

from modal_functions.transcript import Segment

REPETITION: Final = "repetition"
LOW_CONFIDENCE: Final = "low_confidence"
NO_SPEECH: Final = "no_speech"

# Whisper's own thresholds.
_COMPRESSION_RATIO: Final = 2.4
_AVG_LOGPROB: Final = -1.0
_NO_SPEECH_PROB: Final = 0.6
# Not Whisper's. Its no_speech_prob alone doubts good text: in 80 minutes of clear speech (base) 40
# segments were above 0.6, of which three were below -0.5: the ends of spans or of windows.
_UNSURE_LOGPROB: Final = -0.5

# In text without spaces and punctuation; a loop of more than 200 letters has not been seen.
_LOOP: Final = re.compile(r"(.{7,200}?)\1{2,}|(.{1,6}?)\2{7,}")


def flag_doubtful(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Return the segments, in order, with their `flags` set anew."""
    loops = _in_loops([_letters(segment.text) for segment in segments])
    return tuple(
        replace(segment, flags=tuple(_flags(segment, is_loop=is_loop)))
        for segment, is_loop in zip(segments, loops, strict=True)
    )


def _flags(segment: Segment, *, is_loop: bool) -> Iterable[str]:
    if is_loop or segment.compression_ratio > _COMPRESSION_RATIO:
        yield REPETITION
    if segment.avg_logprob < _AVG_LOGPROB:
        yield LOW_CONFIDENCE
    if segment.no_speech_prob > _NO_SPEECH_PROB and segment.avg_logprob < _UNSURE_LOGPROB:
        yield NO_SPEECH


def _letters(text: str) -> str:
    return "".join(char for char in text.casefold() if char.isalnum())


def _in_loops(texts: Sequence[str]) -> list[bool]:
    """Tell for each text whether at least half of it belongs to a loop in all of them together."""
    ends = list(accumulate(map(len, texts)))
    looped = [0] * len(texts)
    for loop in _LOOP.finditer("".join(texts)):
        index = bisect_right(ends, loop.start())
        position = loop.start()
        while position < loop.end():
            end = min(ends[index], loop.end())
            looped[index] += end - position
            index, position = index + 1, end
    return [0 < len(text) <= 2 * count for text, count in zip(texts, looped, strict=True)]
