"""A transcript as subtitles and as text: srt, vtt, tsv, txt, json. Pure functions.

Cues follow the habits of broadcasters (Netflix's timed text style guide, the BBC's guidelines):
two lines of 42 characters, 17 characters a second where the speech leaves the time, 1 to 7 s on
screen, two frames between cues, ends and breaks where the sentence has a joint. Widths are in
cells, of which a full-width character takes two: text that is mostly of those gets one line of 16.

Where to cut is found for the whole transcript at once: of all ways to cut it, the cheapest by
`_Costs`. Times are those of the words, or else shares of the segment's by the length of the text.
No cue has the words of two speakers.

Whoever corrects a transcript decides what is set here, so the work is in proportion to the text,
whatever is in it.
"""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Final

from jobs.corrections import speaker_of, turns
from modal_functions.transcript import Segment, Transcript, Word

MIN_LINE_LENGTH: Final = 10
MAX_LINE_LENGTH: Final = 200
MAX_LINES: Final = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """How subtitles are set. Lengths in cells, times in milliseconds.

    What is None depends on the script: 2 lines of 42 cells, or 1 of 32 for full-width text.
    """

    max_line_length: int | None = None
    max_lines: int | None = None
    cells_per_second: float = 17.0
    min_duration: int = 1000
    max_duration: int = 7000
    min_gap: int = 80  # two frames of 25 a second
    closed_gap: int = 500  # a shorter gap looks like flicker: the cue stays on until the next


@dataclass(frozen=True, slots=True)
class Cue:
    """What is on screen from ``start`` to ``end``, in milliseconds, and who says it, if known."""

    start: int
    end: int
    lines: tuple[str, ...]
    speaker: str | None = None


@dataclass(frozen=True, slots=True)
class _Atom:
    """Text that no line break divides, in seconds."""

    text: str
    start: float
    end: float
    spaced: bool  # whether a space stands before it
    width: int
    speaker: str | None = None
    is_label: bool = False  # the speaker's name itself


# Words that belong to what follows them: no line ends with one, and one may well begin a line.
_LEADING: Final = frozenset(
    """
    a an the and or but nor so if as that which who when where while because than of to in on at
    by for from with into about over under after before my your his her its our their mr mrs ms
    dr st prof
    der die das den dem des ein eine einen einem einer und oder aber dass weil wenn als mit von
    zu im am auf für
    le la les un une des du de et ou mais que qui dans pour avec sur par au aux
    el los las una unos unas y o pero en con por para del al
    il lo gli uno ma che di da nel con per e
    os um uma mas em no na do da het een van en maar met voor
    """.split()  # noqa: SIM905 - readable
)
_TITLES: Final = frozenset({"mr.", "mrs.", "ms.", "dr.", "st.", "prof.", "vs."})
_SENTENCE_ENDS: Final = ".?!…。？！｡؟।॥።"  # noqa: RUF001 - the scripts' own marks
_CLAUSE_ENDS: Final = ",;:、，；：،؛–—"  # noqa: RUF001
_CLOSING: Final = frozenset("\"'”’»›)]}」』）］｝】〉》")  # noqa: RUF001
# What may not begin and what may not end a line, in scripts that break between any two characters.
_STICKS_TO_LEFT: Final = (
    frozenset(_SENTENCE_ENDS + _CLAUSE_ENDS + "%°ー々ゝゞっゃゅょァィゥェォッャュョ・〜") | _CLOSING
)
_STICKS_TO_RIGHT: Final = frozenset("“‘«‹([{「『（［｛【〈《$¥€£#@")  # noqa: RUF001
_UNSPACED_BLOCKS: Final = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF))
_WIDE: Final = frozenset("WF")
_WITHOUT_CELL: Final = frozenset({"Mn", "Me", "Cf"})
_NO_SPACE: Final = re.compile(r"\S")
_ENDS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "sentence": tuple(_SENTENCE_ENDS),
    "clause": tuple(_CLAUSE_ENDS),
}
_ALL_CLOSING: Final = "".join(_CLOSING)


class _Costs:
    """What speaks against a cut; the sum over all cues decides. Found by trying."""

    CUE = 3.0  # each cue
    INNER_SENTENCE = 5.0  # a sentence that ends within a cue: rather begin another
    PAUSE = 3.0  # each second of silence within a cue, beyond half a second
    HURRY = 10.0  # each second that a cue is shorter than it takes to read
    EMPTINESS = 2.0  # a cue that is hardly filled, squared
    ORPHAN = 4.0  # a single short word that is no sentence
    BREAK: Final[Mapping[str, float]] = {
        "sentence": 0.0, "clause": 1.0, "segment": 2.0, "before": 2.5, "any": 4.0, "bad": 8.0
    }  # fmt: skip


_LONG_PAUSE: Final = 2.0  # seconds: no cue goes on over it
# More than anybody says in the time that a cue may last. What says more is looked at that far.
_MOST_ATOMS: Final = 64


def cells(text: str) -> int:
    """Return how many cells wide a text is: 2 for full-width characters, 0 for marks on others."""
    return len(text) if text.isascii() else sum(map(_cell, text))


@lru_cache(4096)
def _cell(char: str) -> int:
    if unicodedata.east_asian_width(char) in _WIDE:
        return 2
    return 0 if unicodedata.category(char) in _WITHOUT_CELL else 1


# Atoms --------------------------------------------------------------------------------------------


def _atoms(transcript: Transcript, line_length: int, *, labels: bool) -> Iterator[_Atom]:
    segments = transcript.segments
    if not segments and transcript.text.strip():
        segments = (Segment(0.0, transcript.duration, transcript.text, 0.0, 0.0, 0.0),)
    said_last: str | None = None
    for segment in segments:
        atoms, speaker = list(_segment_atoms(segment, line_length)), speaker_of(segment)
        if speaker is not None:
            atoms = [replace(atom, speaker=speaker) for atom in atoms]
        if atoms and labels and speaker not in {None, said_last}:
            yield from _label(atoms[0], line_length)
        if atoms:
            said_last = speaker
        yield from atoms


def _label(first: _Atom, line_length: int) -> Iterator[_Atom]:
    """Yield what stands before the first words of a turn: who speaks. It takes no time."""
    for part in f"{first.speaker}:".split():
        atom = replace(first, text=part, end=first.start, spaced=True, width=cells(part))
        yield from (replace(a, is_label=True) for a in _cut_hard(atom, line_length))


def _segment_atoms(segment: Segment, line_length: int) -> Iterator[_Atom]:
    for unit in _glued(_timed_words(segment) or _shares(segment), line_length):
        yield from _cut_hard(unit, line_length)


def _timed_words(segment: Segment) -> list[_Atom] | None:
    """Return the segment's words as they stand in its text, or None where they are others."""
    text, place, found = segment.text, 0, list[_Atom]()
    for word in segment.words or ():
        spoken = word.word.strip()
        if not spoken:
            continue
        at = _NO_SPACE.search(text, place)
        if at is None or not text.startswith(spoken, at.start()):
            return None
        begin = at.start()
        spaced = begin > place or not found
        place = begin + len(spoken)
        found += _word_atoms(replace(word, word=spoken), spaced=spaced)
    return None if text[place:].strip() else found


def _word_atoms(word: Word, *, spaced: bool) -> Iterator[_Atom]:
    parts = word.word.split()
    seconds = (word.end - word.start) / len(parts)
    for number, part in enumerate(parts):
        start = word.start + number * seconds
        yield _Atom(part, start, start + seconds, spaced or number > 0, cells(part))


def _shares(segment: Segment) -> list[_Atom]:
    """Give each piece of the text its share of the segment's time."""
    pieces = [
        (piece, number == 0)
        for token in segment.text.split()
        for number, piece in enumerate(_pieces(token))
    ]
    weights = [max(1, cells(piece)) for piece, _ in pieces]
    second = (segment.end - segment.start) / max(1, sum(weights))
    atoms, before = list[_Atom](), 0
    for (piece, spaced), weight in zip(pieces, weights, strict=True):
        start, end = (segment.start + second * n for n in (before, before + weight))
        atoms.append(_Atom(piece, start, end, spaced, cells(piece)))
        before += weight
    return atoms


def _pieces(token: str) -> list[str]:
    """Return a token's parts between which a line may break: most have none."""
    if token.isascii():  # none breaks without a full-width character
        return [token]
    breaks = [n for n, (a, b) in enumerate(pairwise(token), 1) if _breaks_between(a, b)]
    return [token[begin:end] for begin, end in pairwise([0, *breaks, len(token)])]


def _breaks_between(left: str, right: str) -> bool:
    """Whether a line may end between two characters without a space between them."""
    if (
        left in _STICKS_TO_RIGHT
        or right in _STICKS_TO_LEFT
        or unicodedata.category(right)[0] == "M"
    ):
        return False
    if _is_katakana(left) and _is_katakana(right):
        return False
    return any(unicodedata.east_asian_width(char) in _WIDE for char in (left, right))


def _is_katakana(char: str) -> bool:
    return "\u30a0" <= char <= "\u30ff"


def _is_hiragana(char: str) -> bool:
    return "\u3040" <= char <= "\u309f"


def _is_unspaced(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in _UNSPACED_BLOCKS)


def _glued(units: Sequence[_Atom], line_length: int) -> Iterator[_Atom]:
    """Join what no line break may divide: halves of words, punctuation and its word."""
    last: _Atom | None = None
    for unit in units:
        if last is None:
            last = unit
        elif _belong_together(last, unit) and last.width + unit.width <= line_length:
            text = last.text + unit.text
            last = replace(last, text=text, end=unit.end, width=last.width + unit.width)
        else:
            yield last
            last = unit
    if last is not None:
        yield last


def _belong_together(left: _Atom, right: _Atom) -> bool:
    if right.spaced:
        return False
    a, b = left.text[-1], right.text[0]
    if _is_unspaced(a) and _is_unspaced(b):  # words as the engine found them
        return unicodedata.category(b)[0] == "M"
    return not _breaks_between(a, b)


def _cut_hard(atom: _Atom, line_length: int) -> Iterator[_Atom]:
    """Cut what is longer than a line, but not between a character and the marks on it."""
    if atom.width <= line_length:
        yield atom
        return
    cuts, width = [0], 0
    for place, char in enumerate(atom.text):
        width += _cell(char)
        if place and width > line_length and unicodedata.category(char)[0] != "M":
            cuts.append(place)
            width = _cell(char)
    second = (atom.end - atom.start) / len(atom.text)
    for begin, stop in pairwise([*cuts, len(atom.text)]):
        part = atom.text[begin:stop]
        start, end = (atom.start + place * second for place in (begin, stop))
        spaced = atom.spaced and begin == 0
        yield replace(atom, text=part, start=start, end=end, spaced=spaced, width=cells(part))


def _in_order(atoms: Iterable[_Atom]) -> list[_Atom]:
    """Let no atom start before the one before it: engines' times may."""
    ordered, latest = list[_Atom](), 0.0
    for atom in atoms:
        start = max(latest, atom.start)
        if start > atom.start or start > atom.end:
            atom = replace(atom, start=start, end=max(start, atom.end))  # noqa: PLW2901
        ordered.append(atom)
        latest = start
    return ordered


# Cuts ---------------------------------------------------------------------------------------------


def _joint(left: _Atom, right: _Atom) -> str:
    """Return what stands between two atoms, a key of ``_Costs.BREAK``."""
    if left.is_label:
        return "bad"
    word = left.text.lower().lstrip("¿¡\"'([«“„")
    bare = word.rstrip(_ALL_CLOSING)
    if word in _TITLES or word in _LEADING:
        return "bad"
    for joint, ends in _ENDS_OF.items():
        if bare.endswith(ends):
            return joint
    if not right.spaced:  # in Japanese, words rather begin behind hiragana, and seldom with it
        begins = _is_hiragana(left.text[-1]) and not _is_hiragana(right.text[0])
        return "before" if begins else "bad"
    return "before" if right.text.lower().strip("¿¡\"'([«“„") in _LEADING else "any"


class _Cutter:
    """Finds the cheapest cuts of a run of atoms."""

    def __init__(self, atoms: Sequence[_Atom], layout: Layout) -> None:
        assert layout.max_line_length is not None
        assert layout.max_lines is not None
        self._atoms = atoms
        self._layout = layout
        self._length = layout.max_line_length
        self._lines = layout.max_lines
        self._joints = [*(_joint(a, b) for a, b in pairwise(atoms)), "sentence"]
        #: What each atom costs at the end of a cue, and within one, as far as that is known before.
        self._ending = [_Costs.CUE + _Costs.BREAK[joint] for joint in self._joints]
        self._within = [0.0, *map(self._inner_cost, range(1, len(atoms)))]
        # By width. One full-width character may be more than a line.
        widths, capacity = range(max(2, self._length) * self._lines + 1), self._length * self._lines
        self._emptiness = [_Costs.EMPTINESS * max(0.0, 1 - n / capacity) ** 2 for n in widths]
        self._reading = [_reading_time(width, layout) for width in widths]

    def _inner_cost(self, place: int) -> float:
        """Return what it costs that a cue goes on with this atom; infinity where none may."""
        before, atom = self._atoms[place - 1], self._atoms[place]
        pause = atom.start - before.end
        if pause > _LONG_PAUSE or atom.speaker != before.speaker:
            return math.inf
        sentence = _Costs.INNER_SENTENCE * (self._joints[place - 1] == "sentence")
        return _Costs.PAUSE * max(0.0, pause - 0.5) + sentence

    def cues(self) -> list[tuple[int, int, tuple[str, ...]]]:
        """Return the cues: ranges of atoms, and their lines."""
        ranges = self._ranges()
        return [(begin, end, self._broken(begin, end)) for begin, end in ranges]

    def _ranges(self) -> list[tuple[int, int]]:
        count = len(self._atoms)
        best = [0.0] + [math.inf] * count
        origin = [0] * (count + 1)
        for begin in range(count):
            so_far = best[begin]
            for end, cost in self._cues_from(begin):
                if so_far + cost < best[end]:
                    best[end], origin[end] = so_far + cost, begin
        return _ranges_to(origin)

    def _cues_from(self, begin: int) -> Iterator[tuple[int, float]]:
        """Yield where a cue that begins there may end, and what it costs."""
        lines, line, width, inner = 1, 0, 0, 0.0
        start = self._atoms[begin].start
        for place in range(begin, min(begin + _MOST_ATOMS, len(self._atoms))):
            atom = self._atoms[place]
            needed = atom.width + (atom.spaced and line > 0)
            if line + needed > self._length and place > begin:
                lines, line, needed = lines + 1, 0, atom.width
            line += needed
            width += needed
            if place > begin:
                inner += self._within[place]
                too_long = (atom.end - start) * 1000 > self._layout.max_duration
                if lines > self._lines or too_long or inner == math.inf:
                    return
            yield place + 1, inner + self._cost(begin, place, width)

    def _cost(self, begin: int, last: int, width: int) -> float:
        cost = self._ending[last] + self._emptiness[width]
        if begin == last and self._joints[last] != "sentence" and width < self._length / 4:
            cost += _Costs.ORPHAN
        if last + 1 < len(self._atoms):
            start = self._atoms[begin].start
            time = (self._atoms[last + 1].start - start) * 1000 - self._layout.min_gap
            if (reading := self._reading[width]) > time:
                cost += _Costs.HURRY * (reading - time) / 1000
        return cost

    def _broken(self, first: int, last: int) -> tuple[str, ...]:
        """Break a cue into as few lines as it takes, at joints and of about equal length."""
        atoms, joints = self._atoms[first:last], self._joints[first:last]
        limit, count = self._length, len(atoms)
        best: list[tuple[int, float]] = [(0, 0.0)] + [(count + 1, math.inf)] * count
        origin = [0] * (count + 1)
        for begin in range(count):
            width = 0
            for end in range(begin + 1, count + 1):
                atom = atoms[end - 1]
                width += atom.width + (atom.spaced and end > begin + 1)
                if width > limit and end > begin + 1:
                    break
                cost = (width / limit) ** 2 * 12  # of lines with one sum, equal ones cost least
                if end < count:
                    cost += _Costs.BREAK[joints[end - 1]]
                total = (best[begin][0] + 1, best[begin][1] + cost)
                if total < best[end]:
                    best[end], origin[end] = total, begin
        return tuple(_joined(atoms[begin:end]) for begin, end in _ranges_to(origin))


def _ranges_to(origin: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges up to the end; ``origin`` says where the one begins that ends there."""
    ranges, end = list[tuple[int, int]](), len(origin) - 1
    while end:
        ranges.append((origin[end], end))
        end = origin[end]
    return ranges[::-1]


def _joined(atoms: Sequence[_Atom]) -> str:
    return atoms[0].text + "".join(" " * a.spaced + a.text for a in atoms[1:])


def _reading_time(width: int, layout: Layout) -> float:
    seconds = width / layout.cells_per_second
    return min(layout.max_duration, max(layout.min_duration, seconds * 1000))


# Cues ---------------------------------------------------------------------------------------------


def cues(transcript: Transcript, layout: Layout = Layout(), *, labels: bool = False) -> list[Cue]:
    """Return the transcript's subtitles: all of its text, once, in order, none overlapping.

    With ``labels``, each turn begins with its speaker's name. Where the recording is shorter than
    its text takes to show at all, cues go on past its end.
    """
    layout = _for_script(transcript.text, layout)
    assert layout.max_line_length is not None
    atoms = _in_order(_atoms(transcript, layout.max_line_length, labels=labels))
    if not atoms:
        return []
    found = _Cutter(atoms, layout).cues()
    texts = [text for _, _, text in found]
    spoken = [(atoms[begin].start, atoms[end - 1].end) for begin, end, _ in found]
    times = _times(spoken, [sum(map(cells, text)) for text in texts], transcript.duration, layout)
    speakers = [atoms[begin].speaker for begin, _, _ in found]
    return [
        Cue(start, end, text, speaker)
        for (start, end), text, speaker in zip(times, texts, speakers, strict=True)
    ]


def _for_script(text: str, layout: Layout) -> Layout:
    """Fill in what depends on whether the text is mostly full-width."""
    wide = sum(unicodedata.east_asian_width(char) in _WIDE for char in text)
    is_wide = wide > sum(not char.isspace() for char in text) / 2
    length, lines = (32, 1) if is_wide else (42, 2)
    return replace(
        layout,
        max_line_length=layout.max_line_length or length,
        max_lines=layout.max_lines or lines,
    )


def _times(
    spoken: Sequence[tuple[float, float]], widths: Sequence[int], duration: float, layout: Layout
) -> Iterator[tuple[int, int]]:
    """Yield when each cue is on screen: as spoken, longer where it takes longer to read."""
    count = len(spoken)
    limit = max(int(duration * 1000), 2 * count)
    pitch = min(layout.min_gap + 100, limit // count)  # from one start to the next, at least
    gap = min(layout.min_gap, pitch // 2)
    starts = list[int]()
    for start, _ in spoken:
        starts.append(max(round(start * 1000), starts[-1] + pitch if starts else 0))
    starts = [min(start, limit - (count - n) * pitch) for n, start in enumerate(starts)]
    for start, after, (_, end), width in zip(
        starts, [*starts[1:], limit + gap], spoken, widths, strict=True
    ):
        wanted = max(round(end * 1000), start + round(_reading_time(width, layout)))
        if after - wanted < layout.closed_gap and after <= limit:
            wanted = after
        yield start, min(wanted, start + layout.max_duration, after - gap)


# Formats ------------------------------------------------------------------------------------------


def _clock(milliseconds: int, mark: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{mark}{rest:03}"


def srt(transcript: Transcript, layout: Layout = Layout()) -> str:
    """Return SubRip subtitles. The format has no escapes: an arrow in the text is spaced out.

    Nor has it speakers: a turn begins with "name: ".
    """
    blocks = []
    for number, cue in enumerate(cues(transcript, layout, labels=True), 1):
        text = "\n".join(cue.lines).replace("-->", "-- >")
        blocks.append(f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{text}\n")
    return "\n".join(blocks)


def vtt(transcript: Transcript, layout: Layout = Layout()) -> str:
    """Return WebVTT subtitles; speakers are their cues' voices."""
    blocks = ["WEBVTT\n"]
    for cue in cues(transcript, layout):
        voice = "" if cue.speaker is None else f"<v {_escaped(cue.speaker)}>"
        text = voice + _escaped("\n".join(cue.lines))
        blocks.append(f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{text}\n")
    return "\n".join(blocks)


def _escaped(text: str) -> str:
    for char, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(char, escaped)
    return text


def tsv(transcript: Transcript, _: Layout = Layout()) -> str:
    """Return the segments as Whisper's tsv: start and end in milliseconds, and text.

    A row may be read without the others, so its text begins with its speaker's name.
    """
    rows = ["start\tend\ttext\n"]
    for segment in transcript.segments:
        if text := " ".join(segment.text.split()):
            text = _labelled(speaker_of(segment), text)
            rows.append(f"{round(segment.start * 1000)}\t{round(segment.end * 1000)}\t{text}\n")
    return "".join(rows)


def _labelled(speaker: str | None, text: str) -> str:
    return text if speaker is None else f"{' '.join(speaker.split())}: {text}"


def txt(transcript: Transcript, _: Layout = Layout()) -> str:
    """Return the text, with a newline at its end; with speakers, a paragraph for each turn."""
    if any(map(speaker_of, transcript.segments)):
        return "\n".join(f"{_labelled(turn.speaker, turn.text)}\n" for turn in turns(transcript))
    return f"{transcript.text}\n" if transcript.text else ""


def as_json(transcript: Transcript, _: Layout = Layout()) -> str:
    """Return the transcript as it is stored."""
    return json.dumps(transcript.to_dict(), ensure_ascii=False)


FORMATS: Final[Mapping[str, Callable[[Transcript, Layout], str]]] = {
    "json": as_json,
    "txt": txt,
    "srt": srt,
    "vtt": vtt,
    "tsv": tsv,
}
