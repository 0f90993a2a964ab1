"""Transcripts as their owners have corrected them: what was said, and by whom. Pure functions.

What was transcribed stays as it is in the job's result. Corrections lie beside it, in
``public.transcript_corrections``, and are put in whenever somebody reads the transcript.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import groupby
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from jobs.alignment import align
from modal_functions.transcript import Segment, Transcript, join_text


class Correction(BaseModel):
    """What is corrected of the ``segment`` with that place, from 0. ``None``: as transcribed.

    An empty ``text`` leaves the segment out.
    """

    model_config = ConfigDict(frozen=True)

    segment: int
    text: str | None
    speaker: str | None
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Change:
    """A change of ``text``, ``speaker`` or both. What is absent stays; ``None`` takes it back."""

    segment: int
    fields: Mapping[str, str | None]


@dataclass(frozen=True)
class CorrectedSegment(Segment):
    """A segment with its speaker, where that is known, and its ``original`` text, if it changed.

    The segment is left out where its text is empty.
    """

    speaker: str | None = None
    original: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the segment, ready for JSON; what does not apply has no key."""
        data = super().to_dict()
        if self.speaker is not None:
            data["speaker"] = self.speaker
        if self.original is not None:
            data |= {"corrected": True, "original": self.original}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned."""
        return super().from_dict({key: data[key] for key in data if key != "corrected"})


@dataclass(frozen=True)
class CorrectedTranscript(Transcript):
    """A transcript with corrections in it. ``task`` says in which language it is."""

    task: str = "transcribe"


@dataclass(frozen=True, slots=True)
class Turn:
    """What somebody says until somebody else does. ``speaker``: ``None`` if that is not known."""

    speaker: str | None
    text: str


def apply(
    transcript: Transcript, corrections: Iterable[Correction], *, task: str = "transcribe"
) -> Transcript:
    """Return a transcript with corrections put in. ``task`` is the job's option.

    Words of a text that was changed have new times; its flags, which doubted the text before it
    was changed, are gone.
    """
    by_segment = {correction.segment: correction for correction in corrections}
    unspaced = join_text("ab", language=transcript.language, task=task) == "ab"
    segments = tuple(
        _corrected(segment, by_segment.get(place), unspaced=unspaced)
        for place, segment in enumerate(transcript.segments)
    )
    text = transcript.text
    if any(isinstance(s, CorrectedSegment) and s.original is not None for s in segments):
        text = join_text((s.text for s in segments), language=transcript.language, task=task)
    kept = {part.name: getattr(transcript, part.name) for part in fields(Transcript)}
    return CorrectedTranscript(**kept | {"text": text, "segments": segments}, task=task)


def _corrected(segment: Segment, correction: Correction | None, *, unspaced: bool) -> Segment:
    if correction is None:
        return segment
    values = {part.name: getattr(segment, part.name) for part in fields(Segment)}
    values["speaker"] = correction.speaker
    text = segment.text if correction.text is None else correction.text.strip()
    if text != segment.text:
        words = None if segment.words is None else align(segment, text, unspaced=unspaced)
        values |= {"text": text, "words": words, "flags": (), "original": segment.text}
    return CorrectedSegment(**values)


def read_transcript(data: Mapping[str, Any]) -> Transcript:
    """Return a transcript as the API has it, with corrections or without."""
    segments = tuple(
        (CorrectedSegment if segment.keys() & {"speaker", "corrected"} else Segment).from_dict(
            segment
        )
        for segment in data["segments"]
    )
    return Transcript(**{**data, "segments": segments})


def speaker_of(segment: Segment) -> str | None:
    """Return who speaks in a segment, where that is known."""
    return segment.speaker if isinstance(segment, CorrectedSegment) else None


def turns(transcript: Transcript) -> Iterator[Turn]:
    """Yield who says what, in order; nothing of segments that are left out."""
    task = transcript.task if isinstance(transcript, CorrectedTranscript) else "transcribe"
    said = (segment for segment in transcript.segments if segment.text)
    for speaker, segments in groupby(said, speaker_of):
        texts = (segment.text for segment in segments)
        yield Turn(speaker, join_text(texts, language=transcript.language, task=task))


def fingerprint(corrections: Sequence[Correction]) -> str:
    """Return what tells these corrections from others; empty for none."""
    if not corrections:
        return ""
    said = json.dumps([(c.segment, c.text, c.speaker) for c in corrections])
    return hashlib.sha256(said.encode()).hexdigest()[:16]
