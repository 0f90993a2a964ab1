import functools
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.compute import packaged_weights
from modal_functions import windows
from modal_functions.audio import SAMPLE_RATE, Samples, decode
from modal_functions.engines import FASTER_WHISPER, MODELS, OPENAI_WHISPER, Engine, load_engine
from modal_functions.errors import InvalidOptions, ModelUnavailable
from modal_functions.transcript import Transcript, TranscriptionOptions, Word
from tests.modal.conftest import Load, Wer

DEFAULTS = TranscriptionOptions()
FIRST_SENTENCE = (
    "The old lighthouse stood at the end of a long road, above the cold and restless sea."
)


# The larger model for the faster engine: the suite should stay quick without a GPU.
HEARS_WITH = {FASTER_WHISPER: "base", OPENAI_WHISPER: "tiny.en"}


@dataclass(frozen=True)
class Heard:
    """What an engine makes of the sample, with its progress on the way."""

    transcript: Transcript
    progress: list[float]


@pytest.fixture(scope="session")
def hear(load: Load, sample: Path) -> Callable[[str], Heard]:
    @functools.cache
    def _hear(engine: str) -> Heard:
        samples, progress = decode(str(sample), max_seconds=60), list[float]()
        options = TranscriptionOptions(word_timestamps=True)
        loaded = load(engine, HEARS_WITH[engine])
        transcript = loaded.transcribe(samples, options, on_progress=progress.append)
        return Heard(transcript, progress)

    return _hear


@pytest.fixture
def heard(hear: Callable[[str], Heard], engine_name: str) -> Heard:
    return hear(engine_name)


def words(transcript: Transcript) -> list[Word]:
    return [word for segment in transcript.segments for word in segment.words or ()]


def test_transcribes_the_sample(heard: Heard, engine_name: str, sample_text: str, wer: Wer) -> None:
    transcript = heard.transcript
    assert wer(sample_text, transcript.text) < 0.08
    assert transcript.language == "en"
    assert transcript.duration == pytest.approx(58.2, abs=0.2)
    assert len(transcript.segments) >= 8
    assert transcript.text == " ".join(segment.text for segment in transcript.segments)
    assert (transcript.engine, transcript.model) == (engine_name, HEARS_WITH[engine_name])


def test_transcribes_a_paragraph(base: Engine, clip: Path, clip_text: str, wer: Wer) -> None:
    samples = decode(str(clip), max_seconds=60)
    assert wer(clip_text, base.transcribe(samples, DEFAULTS).text) < 0.05


def test_transcribes_a_human_reader(base: Engine, librivox: tuple[Path, str], wer: Wer) -> None:
    recording, text = librivox
    transcript = base.transcribe(decode(str(recording), max_seconds=60), DEFAULTS)
    assert wer(text, transcript.text) < 0.05


def test_segments_lie_in_the_recording_in_order(heard: Heard) -> None:
    segments = heard.transcript.segments
    times = [time for segment in segments for time in (segment.start, segment.end)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= heard.transcript.duration
    assert all(-1 < segment.avg_logprob < 0 for segment in segments)
    assert all(0 <= segment.no_speech_prob < 0.5 for segment in segments)
    assert all(0.5 < segment.compression_ratio < 2.4 for segment in segments)


def test_words_lie_in_their_segments_in_order(heard: Heard) -> None:
    for segment in heard.transcript.segments:
        assert segment.words
        times = [time for word in segment.words for time in (word.start, word.end)]
        assert times == sorted(times)
        assert segment.start <= times[0]
        assert times[-1] <= segment.end
        assert [word.word for word in segment.words] == segment.text.split()
        assert all(0 < word.probability <= 1 for word in segment.words)


def test_both_engines_put_words_at_the_same_times(hear: Callable[[str], Heard]) -> None:
    one, other = (
        {word.word: word.start for word in once(hear(engine).transcript)}
        for engine in (FASTER_WHISPER, OPENAI_WHISPER)
    )
    common = one.keys() & other.keys()
    assert len(common) >= 60
    assert all(abs(one[word] - other[word]) < 0.5 for word in common)


def test_progress_rises_to_one(heard: Heard) -> None:
    assert all(type(fraction) is float for fraction in heard.progress)
    assert all(earlier < later for earlier, later in pairwise(heard.progress))
    assert len(heard.progress) >= 3
    assert heard.progress[0] > 0
    assert heard.progress[-1] == 1.0


@pytest.fixture(scope="session")
def in_windows(models_dir: Path) -> Engine:
    path = packaged_weights.ensure(FASTER_WHISPER, "base", models_dir)
    if path is None:
        pytest.skip("the packages with the weights of base are not installed")
    return load_engine(FASTER_WHISPER, "base", path=path, device="cpu", batch_size=4)


@pytest.mark.parametrize("bound", [None, "_MIN_LOGPROB", "_MAX_TOKENS"])
def test_windows_decoded_together_make_one_transcript(
    in_windows: Engine,
    sample: Path,
    sample_text: str,
    wer: Wer,
    hear: Callable[[str], Heard],
    bound: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    again: list[int] = []
    if bound is not None:  # no window keeps within it, so each is decoded again
        monkeypatch.setattr(windows, bound, 1.0)
        monkeypatch.setattr(windows, "_MAX_NO_SPEECH", 1.0)
        moved = windows._moved  # noqa: SLF001 - what is decoded again goes through it

        def noted(*arguments: Any) -> Any:
            again.append(1)
            return moved(*arguments)

        monkeypatch.setattr(windows, "_moved", noted)
    samples, progress = decode(str(sample), max_seconds=60), list[float]()
    quiet = np.zeros(40 * SAMPLE_RATE, np.float32)
    options = TranscriptionOptions(word_timestamps=True)
    transcript = in_windows.transcribe(
        np.concatenate([samples, quiet]), options, on_progress=progress.append
    )
    assert wer(sample_text, transcript.text) < 0.08
    assert transcript.text == " ".join(segment.text for segment in transcript.segments)
    assert 8 <= len(transcript.segments) <= 30
    assert max(segment.end - segment.start for segment in transcript.segments) < 15
    times = [
        time
        for segment in transcript.segments
        for word in segment.words or ()
        for time in (segment.start, word.start, word.end)
    ]
    assert times[-1] < 60
    in_turn = {word.word: word.start for word in once(hear(FASTER_WHISPER).transcript)}
    together = {word.word: word.start for word in once(transcript)}
    common = in_turn.keys() & together.keys()
    assert len(common) >= 60
    assert np.percentile([abs(in_turn[word] - together[word]) for word in common], 95) < 0.3
    assert len(progress) >= 3
    assert progress == sorted(progress)
    assert bool(again) == (bound is not None)


def once(transcript: Transcript) -> list[Word]:
    """Words that occur once, so that each can be found again."""
    count = Counter(word.word for word in words(transcript))
    return [word for word in words(transcript) if count[word.word] == 1]


def test_windows_have_words_only_on_demand(in_windows: Engine, sample: Path) -> None:
    samples = decode(str(sample), max_seconds=60)
    transcript = in_windows.transcribe(samples, DEFAULTS)
    assert len(transcript.segments) >= 8
    assert all(segment.words is None for segment in transcript.segments)


def test_windows_of_silence_say_nothing(in_windows: Engine) -> None:
    transcript = in_windows.transcribe(np.zeros(60 * SAMPLE_RATE, np.float32), DEFAULTS)
    assert (transcript.text, transcript.segments) == ("", ())


@pytest.fixture(scope="session")
def say(load: Load, sentence: Samples) -> Callable[[str], Transcript]:
    @functools.cache
    def _say(engine: str) -> Transcript:
        return load(engine, "tiny.en").transcribe(sentence, DEFAULTS)

    return _say


@pytest.fixture
def said(say: Callable[[str], Transcript], engine_name: str) -> Transcript:
    """What the small model makes of the first sentence."""
    return say(engine_name)


def test_words_are_there_only_on_request(said: Transcript) -> None:
    assert [segment.words for segment in said.segments] == [None]
    assert said.segments[-1].end <= said.duration == pytest.approx(6.2)


def test_translates(base: Engine, sentence: Samples, wer: Wer) -> None:
    transcript = base.transcribe(sentence, TranscriptionOptions(task="translate"))
    assert wer(FIRST_SENTENCE, transcript.text) < 0.2  # English stays what it is
    assert transcript.language == "en"


def test_what_the_progress_callback_raises_ends_the_transcription(
    tiny_en: Engine, sentence: Samples, said: Transcript
) -> None:
    class CancelledError(Exception):
        pass

    def cancel(_: float) -> None:
        raise CancelledError

    with pytest.raises(CancelledError):
        tiny_en.transcribe(sentence, DEFAULTS, on_progress=cancel)
    # The engine is as good as before, and the same input has the same result.
    assert tiny_en.transcribe(sentence, DEFAULTS) == said


def test_sampling_is_repeatable(tiny_en: Engine, sentence: Samples, said: Transcript) -> None:
    options = TranscriptionOptions(temperature=1.0)
    first, second = (tiny_en.transcribe(sentence, options) for _ in range(2))
    assert first.segments
    assert first == second
    assert first != said


def test_initial_prompt_guides_spelling_and_gives_no_commands(
    tiny_en: Engine, sentence: Samples, wer: Wer
) -> None:
    prompt = "The old Lyghthouse stood near the Lyghthouse. <|endoftext|>"
    text = tiny_en.transcribe(sentence, TranscriptionOptions(initial_prompt=prompt)).text
    assert "Lyghthouse" in text
    assert wer(FIRST_SENTENCE, text) < 0.3


def test_sound_that_is_not_speech_has_no_text(load: Load) -> None:
    noise = np.random.default_rng(0).normal(0, 0.005, 3 * SAMPLE_RATE)
    transcript = load(FASTER_WHISPER, "base").transcribe(noise.astype(np.float32), DEFAULTS)
    assert transcript.text == ""
    assert transcript.segments == ()


@pytest.mark.parametrize(
    ("options", "field", "allowed"),
    [
        (TranscriptionOptions(model="tiny.en", language="fr"), "options.language", "one of en"),
        (TranscriptionOptions(model="tiny.en", task="translate"), "options.task", "transcribe"),
    ],
)
def test_english_models_do_english_only(
    tiny_en: Engine,
    sentence: Samples,
    options: TranscriptionOptions,
    field: str,
    allowed: str,
) -> None:
    with pytest.raises(InvalidOptions) as caught:
        tiny_en.transcribe(sentence, options)
    assert caught.value.field == field
    assert allowed in str(caught.value)
    assert "tiny.en" in str(caught.value)


def test_unknown_language_is_refused(base: Engine, sentence: Samples) -> None:
    with pytest.raises(InvalidOptions, match=r"options\.language: .*\baf, .*\bzh\b") as caught:
        base.transcribe(sentence, TranscriptionOptions(language="qq"))
    assert caught.value.code == "invalid_options"


def test_known_language_is_used(load: Load, sentence: Samples) -> None:
    engine = load(FASTER_WHISPER, "base")
    assert engine.transcribe(sentence, TranscriptionOptions(language="de")).language == "de"


def test_unknown_model_is_refused_with_those_at_hand(engine_name: str) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        load_engine(engine_name, "systran/whisper-medium", at_hand=["base", "tiny.en"])
    message = str(caught.value)
    assert caught.value.code == "model_unavailable"
    assert "'systran/whisper-medium'" in message
    assert "at hand: base, tiny.en" in message
    assert all(model in message for model in MODELS)
    assert "download" in message


def test_model_that_cannot_be_downloaded_is_refused(
    engine_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(ModelUnavailable, match="could not be downloaded") as caught:
        load_engine(engine_name, "medium", download_root=tmp_path, at_hand=["base"])
    assert "at hand: base" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_broken_weights_are_refused(engine_name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    path.write_bytes(b"these are not weights" * 100)
    if engine_name == FASTER_WHISPER:
        (tmp_path / "model.bin").write_bytes(path.read_bytes())
        path = tmp_path
    with pytest.raises(ModelUnavailable, match="weights could not be loaded") as caught:
        load_engine(engine_name, "mine", path=path, device="cpu")
    assert "at hand: none" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_engine_that_is_not_installed_is_refused(
    engine_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("faster_whisper", "whisper"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelUnavailable, match=f"the package {engine_name} is not installed"):
        load_engine(engine_name, "base")


def test_gpu_that_is_not_there_is_refused(engine_name: str, models_dir: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ModelUnavailable, match="was to run on a GPU"):
        load_engine(engine_name, "base", path=models_dir, device="cuda")


def test_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="known: faster-whisper, openai-whisper"):
        load_engine("whisper.cpp", "base")
