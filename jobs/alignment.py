"""Times for the words of a text that somebody has corrected. Pure functions.

Words that were kept keep their times. Those in the place of others share their time, and those put
in between share the pause there, which may be none.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Final

from modal_functions.transcript import Segment, Word

_WORD: Final = re.compile(r"\S+")
# A character, with the marks and the punctuation behind it.
_CHARACTER: Final = re.compile(r"\S[^\w\s]*")

# What has grown by more than this is no correction of the words, and would take long to compare.
_GROWTH: Final = 4
_GROWTH_AT_LEAST: Final = 100
# So many pairs of equal words, one in each text, take milliseconds to compare. Speech has dozens.
_MOST_PAIRS: Final = 20_000


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is compared: a word, or a character where words stand without spaces between them."""

    text: str
    spaced: bool  # whether a space stands before it
    start: float = 0.0
    end: float = 0.0
    probability: float = 1.0  # of what a person has written
    word: int | None = None  # which of the engine's words it was


def align(segment: Segment, text: str, *, unspaced: bool) -> tuple[Word, ...]:
    """Return the words of a segment's corrected text, in order and within the segment's time.

    ``unspaced``: the language is written without spaces; there, words are aligned by characters.
    """
    pattern = _CHARACTER if unspaced else _WORD
    words = segment.words or ()
    if not unspaced:
        words = tuple(_whole_words(words, segment.text))
    old = [piece for number, word in enumerate(words) for piece in _pieces(number, word, pattern)]
    new = [
        _Piece(found[0], spaced=found.start() > 0 and text[found.start() - 1].isspace())
        for found in pattern.finditer(text)
    ]
    timed = _in_order(_timed(old, new, segment), segment)
    return tuple(
        Word(piece.start, piece.end, piece.text, piece.probability) for piece in _joined(timed)
    )


def _whole_words(words: Sequence[Word], text: str) -> Iterator[Word]:
    """Join the engine's words that stand in the text without a space: "well" and "-known"."""
    last: Word | None = None
    place = 0
    for word in words:
        begin = text.find(word.word, place)
        if last is not None and begin == place:
            probability = min(last.probability, word.probability)
            last = Word(last.start, word.end, last.word + word.word, probability)
        else:
            if last is not None:
                yield last
            last = word
        if begin >= 0:
            place = begin + len(word.word)
    if last is not None:
        yield last


def _pieces(number: int, word: Word, pattern: re.Pattern[str]) -> list[_Piece]:
    """Divide a word; each piece has the share of its time that its length says."""
    parts = [
        _Piece(part, spaced=False, probability=word.probability, word=number)
        for part in pattern.findall(word.word)
    ]
    return _spread(parts, word.start, word.end)


def _spread(pieces: Sequence[_Piece], start: float, end: float) -> list[_Piece]:
    places = [0]
    for piece in pieces:
        places.append(places[-1] + len(piece.text))
    second = (end - start) / max(1, places[-1])
    times = [*(start + second * place for place in places[:-1]), end]
    return [
        replace(piece, start=begin, end=stop)
        for piece, (begin, stop) in zip(pieces, pairwise(times), strict=True)
    ]


def _timed(old: Sequence[_Piece], new: Sequence[_Piece], segment: Segment) -> Iterator[_Piece]:
    for is_same, (i, i_end), (j, j_end) in _runs(old, new):
        if i_end - i == j_end - j:  # the same words, or others one for one
            for was, piece in zip(old[i:i_end], new[j:j_end], strict=True):
                kept = (was.probability, was.word) if is_same else (1.0, None)
                yield _Piece(piece.text, piece.spaced, was.start, was.end, *kept)
        elif i < i_end:
            yield from _spread(new[j:j_end], old[i].start, old[i_end - 1].end)
        else:
            start = old[i - 1].end if i else segment.start
            end = old[i].start if i < len(old) else segment.end
            yield from _spread(new[j:j_end], start, max(start, end))


_Run = tuple[bool, tuple[int, int], tuple[int, int]]


def _runs(old: Sequence[_Piece], new: Sequence[_Piece]) -> Iterator[_Run]:
    """Yield runs of pieces in both texts, and whether they are the same."""
    if len(new) > max(_GROWTH * len(old), _GROWTH_AT_LEAST):
        yield False, (0, len(old)), (0, len(new))
        return
    a, b = ([_key(piece.text) for piece in pieces] for pieces in (old, new))
    counts = Counter(a)
    if sum(counts[key] for key in b) > _MOST_PAIRS:
        yield False, (0, len(old)), (0, len(new))
        return
    matcher = SequenceMatcher(a=a, b=b, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        yield tag == "equal", (i, i_end), (j, j_end)


def _key(text: str) -> str:
    """Return what two spellings of one word have in common: case and punctuation don't count."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in folded if char.isalnum() or _is_mark(char)) or folded


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "M"


def _in_order(pieces: Iterator[_Piece], segment: Segment) -> Iterator[_Piece]:
    """Let no piece begin before the end of the last one, or end behind the segment's."""
    time, limit = segment.start, max(segment.start, segment.end)
    for piece in pieces:
        start = min(max(time, piece.start), limit)
        time = min(max(start, piece.end), limit)
        yield replace(piece, start=start, end=time)


def _joined(pieces: Iterator[_Piece]) -> Iterator[_Piece]:
    """Join again what was divided into characters, and new ones that no line may end between."""
    last: _Piece | None = None
    for piece in pieces:
        if last is not None and not piece.spaced and _belong_together(last, piece):
            last = replace(last, text=last.text + piece.text, end=piece.end)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _belong_together(left: _Piece, right: _Piece) -> bool:
    if left.word is not None or right.word is not None:
        return left.word == right.word
    return not any(
        unicodedata.east_asian_width(char) in {"W", "F"} for char in (left.text[0], right.text[0])
    )
