"""OpenAI's Whisper and faster-whisper behind one interface, with one shape of transcript.

Both decode as their own defaults say, with what differs chosen by measurement on two cores:

- faster-whisper: beam 5; on a CPU in int8 (10 times as fast as the recording is long), on a GPU in
  float16;
- openai-whisper: on a GPU beam 5 in float16, as its command line does. On a CPU greedy: 8 times
  as fast as the recording is long instead of 2.5, for 0.2 points more word errors.

Neither gets a fixed temperature unless asked: without the fallback to higher ones Whisper loops.
"""

import functools
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Protocol, Self

import numpy as np

from modal_functions.audio import SAMPLE_RATE, Samples
from modal_functions.errors import InvalidOptions, ModelUnavailable
from modal_functions.transcript import Segment, Transcript, TranscriptionOptions, Word, join_text
from modal_functions.windows import MAX_SECONDS, transcribe_windows

FASTER_WHISPER: Final = "faster-whisper"
OPENAI_WHISPER: Final = "openai-whisper"

# Names that stand for another model, with both engines.
ALIASES: Final[Mapping[str, str]] = {"large": "large-v3", "turbo": "large-v3-turbo"}
# Models that both engines know how to download.
MODELS: Final = (
    "tiny", "tiny.en", "base", "base.en", "small", "small.en", "medium", "medium.en",
    "large-v1", "large-v2", "large-v3", "large-v3-turbo", *ALIASES,
)  # fmt: skip

ProgressCallback = Callable[[float], None]

_BEAM_SIZE: Final = 5
_CANDIDATES: Final = 5  # sampled at temperatures above 0, of which the likeliest is taken
_SEED: Final = 0


class Engine(Protocol):
    """A loaded model that transcribes one recording at a time."""

    @property
    def name(self) -> str:
        """The engine's name."""

    @property
    def model(self) -> str:
        """The loaded model's public name."""

    def transcribe(
        self,
        samples: Samples,
        options: TranscriptionOptions,
        *,
        on_progress: ProgressCallback | None = None,
    ) -> Transcript:
        """Transcribe samples of 16 kHz from -1 to 1.

        `on_progress` gets the share of the recording that is done, rising to 1.0; what it raises
        ends the transcription. The same call has the same result. The text is empty when nobody
        speaks. Raises InvalidOptions for a language or task that the model does not know.
        """


def load_engine(  # noqa: PLR0913 - each has a name and a default
    engine: str,
    model: str,
    *,
    path: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    download_root: Path | None = None,
    at_hand: Sequence[str] = (),
    batch_size: int = 1,
) -> Engine:
    """Load a model; `engine` is FASTER_WHISPER or OPENAI_WHISPER.

    `model` is its public name. Its weights are at `path` (a directory for faster-whisper, a .pt
    file for openai-whisper), or else the engine downloads them into `download_root` (by default
    its own cache), which works for MODELS only. `device` is cpu, cuda or auto; `threads` are for
    the CPU, by default as many as the engine likes. `at_hand` are models to name in the error.
    `batch_size` is how many windows of 30 s faster-whisper decodes at a time, see `windows`.

    Raises ModelUnavailable.
    """
    if path is None and model not in MODELS:
        reason = f"it is unknown (known: {', '.join(MODELS)})"
        raise ModelUnavailable(engine, model, reason, at_hand)
    try:
        if engine == FASTER_WHISPER:
            return FasterWhisperEngine(model, path, device, threads, download_root, batch_size)
        if engine == OPENAI_WHISPER:
            return OpenAIWhisperEngine(model, path, device, threads, download_root)
    except ImportError as exc:
        reason = f"the package {engine} is not installed"
        raise ModelUnavailable(engine, model, reason, at_hand) from exc
    except ModelUnavailable:
        raise
    except Exception as exc:  # unpickling, download clients and native code raise anything
        reason = "it could not be downloaded" if path is None else "its weights could not be loaded"
        raise ModelUnavailable(engine, model, reason, at_hand) from exc
    raise ValueError(f"unknown engine {engine!r}; known: {FASTER_WHISPER}, {OPENAI_WHISPER}")


class FasterWhisperEngine:
    """Whisper by CTranslate2: the fastest on a CPU, without torch."""

    name = FASTER_WHISPER

    def __init__(  # noqa: PLR0913, PLR0917 - load_engine's
        self,
        model: str,
        path: Path | None,
        device: str,
        threads: int | None,
        download_root: Path | None,
        batch_size: int,
    ) -> None:
        import ctranslate2
        from faster_whisper import WhisperModel

        self.model = model
        device = _device(self, device, has_gpu=ctranslate2.get_cuda_device_count() > 0)
        self._on_cpu = device == "cpu"
        self._batch_size = batch_size
        self._load = functools.partial(
            WhisperModel,
            str(path or ALIASES.get(model, model)),
            device=device,
            compute_type="int8" if self._on_cpu else "float16",
            cpu_threads=threads or 0,
            download_root=str(download_root) if download_root else None,
        )
        self._whisper = self._load()
        self._has_sampled = False

    def transcribe(
        self,
        samples: Samples,
        options: TranscriptionOptions,
        *,
        on_progress: ProgressCallback | None = None,
    ) -> Transcript:
        """Transcribe; see Engine."""
        _check(options, self.model, self._whisper.supported_languages)
        self._reset_random()
        progress = _Progress(on_progress)
        duration = len(samples) / SAMPLE_RATE
        segments, language = self._decode(samples, options)
        found = []
        for segment, done in segments:
            self._has_sampled |= segment["temperature"] > 0
            found.append(segment)
            progress(done / duration)
        transcript = _transcript(self, options, language, samples, found)
        progress(1.0)
        return transcript

    def _decode(
        self, samples: Samples, options: TranscriptionOptions
    ) -> tuple[Iterator[tuple[dict[str, Any], float]], str]:
        """Return segments with how far they bring it, in seconds, and the language."""
        decoding: dict[str, Any] = {
            "task": options.task,
            "beam_size": _BEAM_SIZE,
            "initial_prompt": _prompt(options),
        }

        def in_turn(samples: Samples, language: str | None) -> tuple[Iterable[Any], Any]:
            return self._whisper.transcribe(  # type: ignore[no-any-return]
                samples,
                language=language,
                best_of=_CANDIDATES,
                word_timestamps=options.word_timestamps,
                **decoding,
                **_temperature(options),
            )

        # A translation's words have no times of their own, by which to divide it.
        is_plain = options.task == "transcribe" and options.temperature is None
        if self._batch_size > 1 and is_plain and len(samples) > MAX_SECONDS * SAMPLE_RATE:
            return transcribe_windows(
                self._whisper,
                samples,
                self._batch_size,
                lambda window, language: in_turn(window, language)[0],
                language=options.language,
                **decoding,
            )
        segments, info = in_turn(samples, options.language)
        return ((vars(segment), segment.end) for segment in segments), info.language

    def _reset_random(self) -> None:
        """Make sampling start anew.

        CTranslate2 takes the seed only where a model's thread samples for the first time, so a
        model that has sampled is loaded again. On a GPU that costs more than repeatable text is
        worth: there only a model's first sampling can be repeated.
        """
        import ctranslate2

        ctranslate2.set_random_seed(_SEED)
        if self._has_sampled and self._on_cpu:
            del self._whisper  # before the next one is in memory
            self._whisper = self._load()
            self._has_sampled = False


class OpenAIWhisperEngine:
    """OpenAI's own implementation, by torch."""

    name = OPENAI_WHISPER

    def __init__(
        self,
        model: str,
        path: Path | None,
        device: str,
        threads: int | None,
        download_root: Path | None,
    ) -> None:
        import torch
        import whisper

        self.model = model
        device = _device(self, device, has_gpu=torch.cuda.is_available())
        self._on_cpu = device == "cpu"
        if threads:
            torch.set_num_threads(threads)
        # A download that was interrupted must not pass for weights that somebody put there.
        root = str(download_root / ".downloads") if download_root else None
        self._whisper = whisper.load_model(
            str(path) if path else model, device=device, download_root=root
        )
        if path and (heads := whisper._ALIGNMENT_HEADS.get(model)):  # noqa: SLF001 - no other way
            self._whisper.set_alignment_heads(heads)

    def transcribe(
        self,
        samples: Samples,
        options: TranscriptionOptions,
        *,
        on_progress: ProgressCallback | None = None,
    ) -> Transcript:
        """Transcribe; see Engine."""
        import torch
        from whisper.tokenizer import LANGUAGES

        known = list(LANGUAGES)[: self._whisper.num_languages]
        _check(options, self.model, known if self._whisper.is_multilingual else ["en"])
        progress = _Progress(on_progress)
        with _reports_by_tqdm(progress):
            torch.manual_seed(_SEED)
            result = self._whisper.transcribe(
                samples,
                language=options.language,
                task=options.task,
                beam_size=None if self._on_cpu else _BEAM_SIZE,
                best_of=None if self._on_cpu else _CANDIDATES,
                fp16=not self._on_cpu,
                word_timestamps=options.word_timestamps,
                initial_prompt=_prompt(options),
                **_temperature(options),
            )
        transcript = _transcript(self, options, result["language"], samples, result["segments"])
        progress(1.0)
        return transcript


def _device(engine: Engine, device: str, *, has_gpu: bool) -> str:
    """Return cpu or cuda. Raises ModelUnavailable where there is no GPU but one is demanded."""
    if device == "cuda" and not has_gpu:
        raise ModelUnavailable(
            engine.name,
            engine.model,
            "it was to run on a GPU, and this machine has none to use",
        )
    return device if device != "auto" else "cuda" if has_gpu else "cpu"


def _check(options: TranscriptionOptions, model: str, languages: Sequence[str]) -> None:
    """Raise InvalidOptions for what a model of these languages cannot do."""
    if options.language is not None and options.language not in languages:
        known = ", ".join(sorted(languages))
        raise InvalidOptions(
            "options.language", f"must be one of {known} with the model {model}, or null"
        )
    if options.task == "translate" and len(languages) == 1:
        raise InvalidOptions(
            "options.task", f"must be transcribe with the model {model}, which knows only English"
        )


def _prompt(options: TranscriptionOptions) -> str | None:
    """Return the prompt as plain text: what looks like one of Whisper's commands is none."""
    prompt = (options.initial_prompt or "").strip()
    return prompt.replace("<|", "< |") or None


def _temperature(options: TranscriptionOptions) -> dict[str, float]:
    return {} if options.temperature is None else {"temperature": options.temperature}


class _Progress:
    """Passes on fractions that rise, up to 1.0."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self._callback = callback
        self._last = -1.0

    def __call__(self, fraction: float) -> None:
        fraction = min(1.0, float(fraction))
        if self._callback is not None and fraction > self._last:
            self._last = fraction
            self._callback(fraction)


class _ProgressBar:
    """As much of tqdm's bar as openai-whisper uses."""

    def __init__(self, progress: _Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def update(self, frames: int) -> None:
        self._done += frames
        self._progress(self._done / max(1, self._total))


_whisper_module: Final = threading.Lock()


@contextmanager
def _reports_by_tqdm(progress: _Progress) -> Iterator[None]:
    """Take the progress bar's place in openai-whisper, which has no other way to tell.

    One at a time: the module and torch's random numbers belong to the whole process.
    """
    with _whisper_module:
        module = importlib.import_module("whisper.transcribe")
        original = module.tqdm

        def bar(*, total: int, **_: object) -> _ProgressBar:
            return _ProgressBar(progress, total)

        module.tqdm = SimpleNamespace(tqdm=bar)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.tqdm = original  # type: ignore[attr-defined]


def _transcript(
    engine: FasterWhisperEngine | OpenAIWhisperEngine,
    options: TranscriptionOptions,
    language: str,
    samples: Samples,
    found: Iterable[Mapping[str, Any]],
) -> Transcript:
    """Build a transcript of what an engine found, which both call by the same names."""
    duration = len(samples) / SAMPLE_RATE
    segments: list[Segment] = []
    for raw in found:
        if raw["text"].strip():
            after = segments[-1].end if segments else 0.0
            segments.append(_segment(raw, after, duration, with_words=options.word_timestamps))
    return Transcript(
        text=join_text((s.text for s in segments), language=language, task=options.task),
        language=language,
        duration=duration,
        segments=tuple(segments),
        engine=engine.name,
        model=engine.model,
    )


def _segment(raw: Mapping[str, Any], after: float, duration: float, *, with_words: bool) -> Segment:
    """Build a segment within the recording; engines may end it in the padding behind."""
    start, end = _within(raw["start"], raw["end"], after, duration)
    return Segment(
        start=start,
        end=end,
        text=raw["text"].strip(),
        avg_logprob=float(raw["avg_logprob"]),
        no_speech_prob=float(raw["no_speech_prob"]),
        compression_ratio=float(raw["compression_ratio"]),
        words=tuple(_words(raw["words"], start, end)) if with_words else None,
    )


def _words(found: Iterable[Any], start: float, end: float) -> Iterator[Word]:
    for item in found:
        raw = item if isinstance(item, dict) else vars(item)
        if text := raw["word"].strip():
            word_start, start = _within(raw["start"], raw["end"], start, end)
            yield Word(word_start, start, text, float(raw["probability"]))


def _within(start: float, end: float, earliest: float, latest: float) -> tuple[float, float]:
    start = float(np.clip(start, earliest, max(earliest, latest)))
    return start, float(np.clip(end, start, max(start, latest)))
