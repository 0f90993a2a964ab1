"""How a long recording is divided: spans, each transcribed by one call, and the plan of all.

Nothing here needs numpy: whoever starts the calls and merges their results may do without.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

SAMPLE_RATE: Final = 16_000  # samples per second


@dataclass(frozen=True, slots=True)
class Span:
    """Samples `start` up to, not including, `end` of a recording.

    `pause_after` is False where it had to end without a pause: a word may be cut in two there.
    """

    start: int
    end: int
    pause_after: bool = True

    @property
    def seconds(self) -> tuple[float, float]:
        """When it starts and ends, in seconds from the start of the recording."""
        return self.start / SAMPLE_RATE, self.end / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class Plan:
    """The spans of a recording, in order; they cover each of its samples exactly once.

    `name` is the recording's for messages, `pcm` is the file that holds its samples, see
    `audio.decode_to_file`, and `peaks` are what it looks like, see `waveform.peaks`.
    """

    name: str
    pcm: Path
    spans: tuple[Span, ...]
    peaks: tuple[int, ...] = ()

    @property
    def sample_count(self) -> int:
        """How many samples the recording has."""
        return self.spans[-1].end

    @property
    def duration(self) -> float:
        """How many seconds the recording lasts."""
        return self.sample_count / SAMPLE_RATE

    def to_dict(self) -> dict[str, Any]:
        """Return the plan, ready for JSON."""
        return {
            "name": self.name,
            "pcm": str(self.pcm),
            "sample_count": self.sample_count,
            "duration": self.duration,
            "spans": [asdict(span) for span in self.spans],
            "peaks": list(self.peaks),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned; peaks are not kept with the rest."""
        spans = tuple(Span(**span) for span in data["spans"])
        peaks = tuple(data.get("peaks", ()))
        return cls(name=data["name"], pcm=Path(data["pcm"]), spans=spans, peaks=peaks)
