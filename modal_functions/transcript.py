"""What is asked for and what comes out: options, and a transcript of segments and words.

Times are seconds from the start of the recording.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

from modal_functions.errors import InvalidOptions

MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
MODEL_NAME_MAX: Final = 200
LANGUAGE_CODE: Final = re.compile(r"[a-z]{2,3}")
INITIAL_PROMPT_MAX: Final = 2000
TASKS: Final = ("transcribe", "translate")

# Whisper's own list of languages that are written without spaces between words.
_UNSPACED: Final = frozenset({"ja", "lo", "my", "th", "yue", "zh"})


def is_model_name(value: object) -> bool:
    """Whether a value is a model's name or a relative path that cannot lead upwards."""
    return (
        isinstance(value, str)
        and len(value) <= MODEL_NAME_MAX
        and ".." not in value
        and MODEL_NAME.fullmatch(value) is not None
    )


def join_text(texts: Iterable[str], *, language: str, task: str = "transcribe") -> str:
    """Join stripped texts of segments or words the way the language is written.

    A translation is English, whatever was spoken.
    """
    separator = "" if language in _UNSPACED and task == "transcribe" else " "
    return separator.join(text for text in texts if text)


def _is_prompt(value: object) -> bool:
    # Postgres stores neither NUL nor half a surrogate pair: what SQL cannot hold is refused here.
    return (
        isinstance(value, str)
        and len(value) <= INITIAL_PROMPT_MAX
        and not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in value)
    )


def _is_temperature(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


_OPTIONS: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "model": (
        is_model_name,
        f"must be a model's name or relative path of at most {MODEL_NAME_MAX} characters (no '..')",
    ),
    "language": (
        lambda value: (
            value is None or (isinstance(value, str) and LANGUAGE_CODE.fullmatch(value) is not None)
        ),
        "must be a code of two or three small letters, such as en, or null to detect it",
    ),
    "task": (lambda value: value in TASKS, f"must be one of {', '.join(TASKS)}"),
    "word_timestamps": (lambda value: isinstance(value, bool), "must be true or false"),
    "initial_prompt": (
        lambda value: value is None or _is_prompt(value),
        f"must be text of at most {INITIAL_PROMPT_MAX} characters, or null",
    ),
    "temperature": (
        lambda value: value is None or _is_temperature(value),
        "must be a number from 0 to 1, or null for the engine's default",
    ),
    "preprocessing": (lambda value: isinstance(value, bool), "must be true or false"),
}


@dataclass(frozen=True, slots=True)
class TranscriptionOptions:
    """How to transcribe. Every instance is valid: making an invalid one raises InvalidOptions.

    The database makes the same checks in SQL. `null` is a value of `language`, `initial_prompt`
    and `temperature` only. Whether the model knows the language is for the engine to say.
    """

    model: str = "base"
    language: str | None = None
    task: str = "transcribe"
    word_timestamps: bool = False
    initial_prompt: str | None = None
    temperature: float | None = None
    preprocessing: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            is_allowed, allowed = _OPTIONS[field.name]
            if not is_allowed(getattr(self, field.name)):
                raise InvalidOptions(f"options.{field.name}", allowed)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """Read options from decoded JSON. Raises InvalidOptions, naming the field."""
        if not isinstance(data, Mapping):
            raise InvalidOptions("options", "must be an object")
        for key in data:
            if key not in _OPTIONS:
                raise InvalidOptions(
                    f"options.{str(key)[:50]}", f"is unknown; known: {', '.join(_OPTIONS)}"
                )
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Return all options, ready for JSON."""
        return asdict(self)


def _rounded(value: float, digits: int) -> float:
    # JSON has no NaN and no infinity, and neither has jsonb.
    return round(float(value), digits) if math.isfinite(value) else 0.0


@dataclass(frozen=True, slots=True)
class Word:
    """A word with its punctuation, stripped; `probability` is from 0 to 1."""

    start: float
    end: float
    word: str
    probability: float

    def to_dict(self) -> dict[str, Any]:
        """Return the word, ready for JSON: times in milliseconds' precision."""
        return {
            "start": _rounded(self.start, 3),
            "end": _rounded(self.end, 3),
            "word": self.word,
            "probability": _rounded(self.probability, 4),
        }


@dataclass(frozen=True, slots=True)
class Segment:
    """A sentence or a part of one; `words` is None unless word times were asked for.

    `avg_logprob` (0 is certain), `no_speech_prob` (0 to 1) and `compression_ratio` (high when the
    text repeats itself) are Whisper's own marks of doubt. `flags` say what follows from them, see
    `doubts.flag_doubtful`; rows of older versions have none.
    """

    start: float
    end: float
    text: str
    avg_logprob: float
    no_speech_prob: float
    compression_ratio: float
    words: tuple[Word, ...] | None = None
    flags: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the segment, ready for JSON; without the keys `words` and `flags` if none."""
        data: dict[str, Any] = {
            "start": _rounded(self.start, 3),
            "end": _rounded(self.end, 3),
            "text": self.text,
            "avg_logprob": _rounded(self.avg_logprob, 4),
            "no_speech_prob": _rounded(self.no_speech_prob, 4),
            "compression_ratio": _rounded(self.compression_ratio, 4),
        }
        if self.words is not None:
            data["words"] = [word.to_dict() for word in self.words]
        if self.flags:
            data["flags"] = list(self.flags)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned."""
        words = data.get("words")
        return cls(
            **{key: value for key, value in data.items() if key not in {"words", "flags"}},
            words=None if words is None else tuple(Word(**word) for word in words),
            flags=tuple(data.get("flags", ())),
        )


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said: the whole text, the language spoken, the recording's length in seconds."""

    text: str
    language: str
    duration: float
    segments: tuple[Segment, ...]
    engine: str
    model: str

    @property
    def has_speech(self) -> bool:
        """Whether there are words; noise may come out as dots."""
        return any(char.isalnum() for char in self.text)

    def to_dict(self) -> dict[str, Any]:
        """Return the transcript, ready for JSON."""
        return {
            "text": self.text,
            "language": self.language,
            "duration": _rounded(self.duration, 3),
            "segments": [segment.to_dict() for segment in self.segments],
            "engine": self.engine,
            "model": self.model,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returned."""
        segments = tuple(Segment.from_dict(segment) for segment in data["segments"])
        return cls(**{**data, "segments": segments})
