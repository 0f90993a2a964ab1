"""What is deployed on Modal, from ``PGSCRIBE_MODAL_…``; Modal checks most of it late or never."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Self

PREFIX: Final = "PGSCRIBE_MODAL_"
GPUS: Final = (
    "T4", "L4", "A10", "A10G", "L40S", "A100", "A100-40GB", "A100-80GB", "RTX-PRO-6000",
    "H100", "H100!", "H200", "B200", "B200+", "ANY",
)  # fmt: skip
DAY: Final = 24 * 3600
DECODING_SPEED: Final = 10  # times as fast as it was spoken, at the least

# Modal's limits, or where it has none what makes sense: inclusive.
RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "max_containers": (1, 1000),
    "prepare_max_containers": (1, 1000),
    "scaledown_window": (2, 3600),
    "span_timeout": (1, DAY),
    "prepare_timeout": (1, DAY),
    "file_timeout": (1, DAY),
    "startup_timeout": (1, DAY),
    "retries": (0, 10),
    "cpu": (0.125, 64),
    "memory_mib": (128, 344_064),
    "max_audio_seconds": (1, DAY),
    "min_span": (1, 3600),
    "max_span": (2, 3600),
    "batch_size": (1, 64),
}
NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAMES: Final = ("app_name", "audio_volume", "weights_volume")


class InvalidConfig(ValueError):
    """What was to be deployed is not usable; each problem names its variable and the way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Times are in seconds. Every instance is valid: making an invalid one raises InvalidConfig."""

    app_name: str = "audio-processing"
    audio_volume: str = "pgscribe-audio"
    weights_volume: str = "pgscribe-weights"
    gpu: str = "L4"
    max_containers: int = 20
    prepare_max_containers: int = 20
    scaledown_window: int = 10
    span_timeout: int = 900
    prepare_timeout: int = 3600
    file_timeout: int = 4 * 3600
    startup_timeout: int = 900
    retries: int = 2
    cpu: float = 2.0
    memory_mib: int = 4096
    max_audio_seconds: int = 4 * 3600
    min_span: float = 30.0
    max_span: float = 90.0
    batch_size: int = 8  # windows of 30 s that faster-whisper decodes at a time
    supabase_secret: str = ""  # without one, update_job_status is not deployed

    def __post_init__(self) -> None:
        if problems := [*self._problems()]:
            raise InvalidConfig("Unusable settings:\n  " + "\n  ".join(problems))

    @classmethod
    def load(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read the environment. Raises InvalidConfig."""
        environment = os.environ if environment is None else environment
        values: dict[str, Any] = {}
        problems = []
        for field in fields(cls):
            text = environment.get(_variable(field.name), "").strip()
            if not text:
                continue
            try:
                values[field.name] = type(_DEFAULTS[field.name])(text)
            except ValueError:
                kind = "a whole number" if isinstance(_DEFAULTS[field.name], int) else "a number"
                problems.append(f"{_variable(field.name)}: must be {kind}, not {text[:40]!r}.")
        known = {_variable(field.name) for field in fields(cls)}
        problems += [
            f"{name}: is unknown; known: {', '.join(sorted(known))}. Correct or unset it."
            for name in sorted(environment)
            if name.startswith(PREFIX) and name not in known
        ]
        if problems:
            raise InvalidConfig("Unusable settings:\n  " + "\n  ".join(problems))
        return cls(**values)

    def environment(self) -> dict[str, str]:
        """Return the variables from which a container makes the same configuration."""
        return {_variable(field.name): str(getattr(self, field.name)) for field in fields(self)}

    @property
    def gpus(self) -> list[str]:
        """The kinds of GPU that will do, the best first."""
        return [gpu.strip() for gpu in self.gpu.split(",")]

    def _problems(self) -> list[str]:
        problems = [
            f"{_variable(name)}: must be 1 to 64 letters, digits, '.', '_' or '-', without spaces, "
            f"not {getattr(self, name)[:70]!r}. Modal names nothing else; choose another name."
            for name in (*_NAMES, *(["supabase_secret"] if self.supabase_secret else []))
            if not NAME.fullmatch(getattr(self, name))
        ]
        problems += [
            f"{_variable('gpu')}: {gpu[:40]!r} is no kind of GPU that Modal has, or has a count: "
            f"one model uses one. Choose of {', '.join(GPUS)}; several, by commas, stand in."
            for gpu in self.gpus
            if gpu.upper() not in GPUS
        ]
        problems += [
            f"{_variable(name)}: must be from {low:g} to {high:g}, not {getattr(self, name):g}."
            f" Leave it out for {_DEFAULTS[name]:g}."
            for name, (low, high) in RANGES.items()
            if not low <= getattr(self, name) <= high
        ]
        if problems:
            return problems
        if self.max_span < 2 * self.min_span:
            problems.append(
                f"{_variable('max_span')}: must be at least twice {_variable('min_span')} "
                f"({self.min_span:g} s), not {self.max_span:g}. Raise it or lower the other."
            )
        # Transcribing as slowly as it was spoken must be in time.
        for name, needed, why in (
            ("span_timeout", self.max_span, "max_span"),
            ("file_timeout", self.max_audio_seconds, "max_audio_seconds"),
            ("prepare_timeout", self.max_audio_seconds / DECODING_SPEED, "max_audio_seconds"),
        ):
            if getattr(self, name) < needed:
                problems.append(
                    f"{_variable(name)}: must be at least {needed:g}, not {getattr(self, name)}, "
                    f"to have time for the longest audio. Raise it or lower {_variable(why)}."
                )
        return problems


def _variable(name: str) -> str:
    return PREFIX + name.upper()


_DEFAULTS: Final[Mapping[str, Any]] = {field.name: field.default for field in fields(Config)}
