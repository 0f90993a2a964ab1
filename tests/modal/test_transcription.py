import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modal_functions import errors
from modal_functions.audio import SAMPLE_RATE, Samples, open_pcm, read_span
from modal_functions.engines import FASTER_WHISPER, Engine, ProgressCallback
from modal_functions.errors import InvalidOptions, TranscriptionError
from modal_functions.merging import merge
from modal_functions.plan import Plan, Span
from modal_functions.transcript import (
    Segment,
    Transcript,
    TranscriptionOptions,
    Word,
    is_model_name,
    join_text,
)
from modal_functions.transcription import prepare, transcribe_chunk, transcribe_file
from tests.modal.conftest import Ffmpeg, Load, Wer

MAX_SECONDS = 60
CLIP_SECONDS = 17

# Options ------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
ALLOWED: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["base", "tiny.en", "team/fine_tuned", "a/b/c", "0" * 200]),
    "language": st.none() | st.from_regex(r"[a-z]{2,3}", fullmatch=True),
    "task": st.sampled_from(["transcribe", "translate"]),
    "word_timestamps": st.booleans(),
    "initial_prompt": st.none()
    | st.just("x" * 2000)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50),
    "temperature": st.none() | st.floats(0, 1) | st.sampled_from([0, 1]),
    "preprocessing": st.booleans(),
}
REFUSED: dict[str, list[Any]] = {
    "model": [None, "", 1, [], "../base", "a/../b", "a..b", "/base", "base/", "a//b", ".base", "-b",
              "a b", "base\n", "bäse", "x" * 201, "a\0b", "https://host/model"],
    "language": ["", "e", "EN", "english", "en\n", "en-US", 1, False, ["en"], "éé"],
    "task": [None, "", "Transcribe", "summarise", True, ["translate"], {}],
    "word_timestamps": [None, 0, 1, "true", [], "false"],
    "initial_prompt": ["x" * 2001, 1, False, ["text"], {}, "a\0b", "\ud800"],
    "temperature": [-0.01, 1.01, True, False, "0.5", [], float("inf"), float("nan"), 10**400],
    "preprocessing": [None, 0, 1, "true", {}],
}  # fmt: skip


def test_defaults() -> None:
    assert TranscriptionOptions.from_dict({}) == TranscriptionOptions()
    assert TranscriptionOptions().to_dict() == {
        "model": "base",
        "language": None,
        "task": "transcribe",
        "word_timestamps": False,
        "initial_prompt": None,
        "temperature": None,
        "preprocessing": False,
    }


@given(st.fixed_dictionaries({}, optional=ALLOWED))
def test_allowed_options_round_trip(data: dict[str, Any]) -> None:
    options = TranscriptionOptions.from_dict(data)
    assert {**TranscriptionOptions().to_dict(), **data} == options.to_dict()
    assert TranscriptionOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values]
)
def test_other_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidOptions) as caught:
        TranscriptionOptions.from_dict({"model": "base", field: value})
    assert caught.value.field == f"options.{field}"
    assert str(caught.value).startswith(f"options.{field}: must be ")
    values: dict[str, Any] = {field: value}
    with pytest.raises(InvalidOptions):
        replace(TranscriptionOptions(), **values)


@given(JSON | st.dictionaries(st.sampled_from(list(ALLOWED)), JSON, max_size=3))
def test_any_json_is_valid_options_or_names_the_field(data: object) -> None:
    try:
        options = TranscriptionOptions.from_dict(data)
    except InvalidOptions as error:
        assert error.field == "options" or error.field.startswith("options.")  # noqa: PT017
        assert error.code == "invalid_options"  # noqa: PT017
    else:
        assert TranscriptionOptions.from_dict(options.to_dict()) == options


def test_unknown_options_are_refused_by_name() -> None:
    with pytest.raises(InvalidOptions, match=r"options\.beam_size: is unknown; known: model, lang"):
        TranscriptionOptions.from_dict({"beam_size": 5})
    with pytest.raises(InvalidOptions) as caught:
        TranscriptionOptions.from_dict({"x" * 1000: 5})
    assert len(caught.value.field) < 100


def test_model_names_are_names() -> None:
    assert is_model_name("large-v3")
    assert not is_model_name(None)
    assert all(not is_model_name(name) for name in REFUSED["model"])


# Transcripts --------------------------------------------------------------------------------------

TIME = st.floats(0, 1e6)
WORDS = st.builds(Word, TIME, TIME, st.text(), st.floats(0, 1))
SEGMENTS = st.builds(
    Segment,
    TIME,
    TIME,
    st.text(),
    st.floats(),
    st.floats(),
    st.floats(),
    st.none() | st.lists(WORDS, max_size=3).map(tuple),
    st.lists(st.sampled_from(["repetition", "no_speech"]), unique=True).map(tuple),
)
TRANSCRIPTS = st.builds(
    Transcript,
    st.text(),
    st.just("en"),
    TIME,
    st.lists(SEGMENTS, max_size=3).map(tuple),
    st.just("faster-whisper"),
    st.just("base"),
)


@given(TRANSCRIPTS)
def test_transcripts_round_trip_through_json(transcript: Transcript) -> None:
    data = transcript.to_dict()
    assert set(data) == {field.name for field in fields(Transcript)}
    decoded = json.loads(json.dumps(data, allow_nan=False))
    assert decoded == data
    assert Transcript.from_dict(decoded).to_dict() == data


def test_times_are_in_milliseconds_and_words_only_where_asked_for() -> None:
    word = Word(0.12345, 1.98765, "Hello", 0.987654)
    segment = Segment(0.12345, 1.98765, "Hello", -0.123456, 0.012345, 1.234567, (word,))
    assert segment.to_dict() == {
        "start": 0.123,
        "end": 1.988,
        "text": "Hello",
        "avg_logprob": -0.1235,
        "no_speech_prob": 0.0123,
        "compression_ratio": 1.2346,
        "words": [{"start": 0.123, "end": 1.988, "word": "Hello", "probability": 0.9877}],
    }
    assert "words" not in replace(segment, words=None).to_dict()
    assert replace(segment, words=()).to_dict()["words"] == []


def test_flags_are_there_only_where_there_is_doubt() -> None:
    sure = Segment(0, 2, "Hello", -0.1, 0.01, 1.2)
    assert "flags" not in sure.to_dict()
    assert Segment.from_dict(sure.to_dict()) == sure  # as rows of older versions
    doubtful = replace(sure, flags=("repetition", "no_speech"))
    assert doubtful.to_dict()["flags"] == ["repetition", "no_speech"]
    assert Segment.from_dict(json.loads(json.dumps(doubtful.to_dict()))) == doubtful


def test_text_is_joined_as_the_language_is_written() -> None:
    assert join_text(["Hello.", "", "World."], language="en") == "Hello. World."
    assert join_text(["你好。", "世界。"], language="zh") == "你好。世界。"
    assert join_text(["Hello.", "World."], language="zh", task="translate") == "Hello. World."


# Errors -------------------------------------------------------------------------------------------


def test_errors_have_stable_codes() -> None:
    codes = {error.__name__: error.code for error in TranscriptionError.__subclasses__()}
    assert codes == {
        "AudioFileNotFound": "file_not_found",
        "SourceUnavailable": "source_unavailable",
        "EmptyFile": "empty_file",
        "InvalidAudio": "invalid_audio",
        "NoAudioStream": "no_audio_stream",
        "EmptyAudio": "empty_audio",
        "TruncatedAudio": "truncated_audio",
        "AudioTooLong": "audio_too_long",
        "NoSpeech": "no_speech",
        "DecoderUnavailable": "decoder_unavailable",
        "PreparedAudioGone": "prepared_audio_gone",
        "InvalidOptions": "invalid_options",
        "ModelUnavailable": "model_unavailable",
    }
    retryable = {error for error in TranscriptionError.__subclasses__() if error.retryable}
    assert retryable == {errors.SourceUnavailable, errors.PreparedAudioGone}


@pytest.mark.parametrize(
    "error",
    [
        errors.NoSpeech("nobody speaks"),
        InvalidOptions("options.task", "must be one of two"),
        errors.ModelUnavailable("faster-whisper", "huge", "it is unknown", ["base"]),
    ],
)
def test_errors_travel_between_processes(error: TranscriptionError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


# From a recording to a transcript -----------------------------------------------------------------


def test_transcribes_a_file(quick: Engine, clip: Path, clip_text: str, wer: Wer) -> None:
    progress: list[float] = []
    options = TranscriptionOptions(model="tiny.en", preprocessing=True)
    transcript = transcribe_file(
        str(clip), options, engine=quick, max_seconds=MAX_SECONDS, on_progress=progress.append
    )
    assert wer(clip_text, transcript.text) < 0.12
    assert transcript.duration == CLIP_SECONDS
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        ("anullsrc=r=16000", "'sound.wav' is silent"),
        ("anoisesrc=r=16000:a=0.0005:seed=1", "'sound.wav' is silent"),
        ("anoisesrc=r=16000:a=0.01:seed=1", "No speech was found in 'sound.wav'"),
    ],
)
@pytest.mark.parametrize("preprocessing", [False, True])
def test_recordings_without_speech_are_refused(
    sound: str, message: str, quick: Engine, ffmpeg: Ffmpeg, tmp_path: Path, *, preprocessing: bool
) -> None:
    recording = ffmpeg("-f", "lavfi", "-t", 3, "-i", sound, tmp_path / "sound.wav")
    options = TranscriptionOptions(model="tiny.en", preprocessing=preprocessing)
    with pytest.raises(errors.NoSpeech, match=message) as caught:
        transcribe_file(str(recording), options, engine=quick, max_seconds=MAX_SECONDS)
    assert str(tmp_path) not in str(caught.value)


def test_errors_of_the_recording_and_of_the_options_come_through(
    quick: Engine, clip: Path, tmp_path: Path
) -> None:
    options = TranscriptionOptions(model="tiny.en", language="fr")
    for source, limit, error in (
        (tmp_path / "absent.mp3", MAX_SECONDS, errors.AudioFileNotFound),
        (clip, 5, errors.AudioTooLong),
        (clip, MAX_SECONDS, InvalidOptions),
    ):
        with pytest.raises(error):
            transcribe_file(str(source), options, engine=quick, max_seconds=limit)


def test_doubtful_segments_are_flagged(clip: Path) -> None:
    segment = Segment(0, 2, "Thank you.", -1.5, 0.9, 3.0)
    engine = FakeEngine([segment, segment])
    transcript = transcribe_file(
        str(clip), TranscriptionOptions(), engine=engine, max_seconds=MAX_SECONDS
    )
    assert (
        transcript.segments
        == (replace(segment, flags=("repetition", "low_confidence", "no_speech")),) * 2
    )


# In spans -----------------------------------------------------------------------------------------


class FakeEngine:
    """Hears the same in everything, and counts how often it is asked."""

    name, model = "fake", "base"

    def __init__(self, segments: Sequence[Segment] = ()) -> None:
        self.segments = tuple(segments)
        self.heard = 0

    def transcribe(
        self,
        samples: Samples,
        options: TranscriptionOptions,  # noqa: ARG002 - of the interface
        *,
        on_progress: ProgressCallback | None = None,  # noqa: ARG002
    ) -> Transcript:
        self.heard += 1
        text = " ".join(segment.text for segment in self.segments)
        duration = len(samples) / SAMPLE_RATE
        return Transcript(text, "en", duration, self.segments, self.name, self.model)


def in_spans(source: Path, plan: Plan, engine: Engine, options: TranscriptionOptions) -> Transcript:
    """Transcribe as workers do, each span and all results by way of JSON."""
    plan = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    results = [
        transcribe_chunk(read_span(plan.pcm, span), options, engine=engine).to_dict()
        for span in plan.spans
    ]
    parts = [
        (span.seconds, Transcript.from_dict(json.loads(json.dumps(result))))
        for span, result in zip(plan.spans, results, strict=True)
    ]
    return merge(parts, name=f"'{source.name}'", task=options.task)


def test_plans_travel_as_json(sample: Path, tmp_path: Path) -> None:
    plan = prepare(
        str(sample),
        tmp_path / "a.pcm",
        preprocessing=False,
        max_seconds=MAX_SECONDS,
        min_span=10,
        max_span=25,
    )
    data = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(data) == plan
    assert len(plan.peaks) == 2000
    del data["peaks"]  # as the database keeps it
    assert Plan.from_dict(data) == replace(plan, peaks=())
    assert data["name"] == "'sample.mp3'"
    assert data["duration"] == plan.duration == pytest.approx(58.2, abs=0.2)
    assert data["sample_count"] == plan.sample_count == len(open_pcm(plan.pcm))
    assert set(data["spans"][0]) == {"start", "end", "pause_after"}


def test_a_short_recording_is_one_chunk(clip: Path, tmp_path: Path) -> None:
    plan = prepare(str(clip), tmp_path / "a.pcm", preprocessing=False, max_seconds=MAX_SECONDS)
    assert plan.spans == (Span(0, CLIP_SECONDS * SAMPLE_RATE),)


def test_silence_and_what_cannot_be_read_are_not_planned(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    silence = ffmpeg("-f", "lavfi", "-t", 100, "-i", "anullsrc=r=16000", tmp_path / "silence.wav")
    pcm = tmp_path / "a.pcm"
    for source, limit, error in (
        (silence, 100, errors.NoSpeech),
        (silence, 50, errors.AudioTooLong),
        (tmp_path / "absent.mp3", 50, errors.AudioFileNotFound),
    ):
        with pytest.raises(error, match=source.name):
            prepare(str(source), pcm, preprocessing=False, max_seconds=limit)
        assert not pcm.exists()


@pytest.mark.parametrize("language", [None, "fr"])
def test_silent_chunks_are_not_sent_to_the_engine(language: str | None) -> None:
    engine, progress = FakeEngine([Segment(0, 2, "Thank you.", -0.2, 0.1, 1)]), list[float]()
    silence = np.full(2 * SAMPLE_RATE, 0.0005, np.float32)
    options = TranscriptionOptions(language=language)
    transcript = transcribe_chunk(silence, options, engine=engine, on_progress=progress.append)
    assert transcript == Transcript("", language or "", 2, (), "fake", "base")
    assert (engine.heard, progress) == (0, [1.0])
    assert transcribe_chunk(silence * 10, options, engine=engine).text == "Thank you."
    assert engine.heard == 1


def test_chunks_in_which_nobody_speaks_are_empty() -> None:
    engine = FakeEngine([Segment(0, 2, "...", -0.2, 0.1, 1)])
    noise = np.full(SAMPLE_RATE, 0.1, np.float32)
    assert transcribe_chunk(noise, TranscriptionOptions(), engine=engine).segments == ()


def test_spans_say_what_the_whole_does(
    load: Load,
    sample: Path,
    sample_text: str,
    librivox: tuple[Path, str],
    ffmpeg: Ffmpeg,
    wer: Wer,
    tmp_path: Path,
) -> None:
    """A minute of a synthetic voice, half a minute of silence, half a minute of a human one."""
    human, human_text = librivox
    graph = "[1]apad=pad_dur=30[a];[a][0]concat=v=0:a=1"
    recording = ffmpeg(
        "-i", human, "-i", sample, "-filter_complex", graph, "-ar", 16000, tmp_path / "both.wav"
    )
    engine, options = load(FASTER_WHISPER, "base"), TranscriptionOptions(word_timestamps=True)
    plan = prepare(
        str(recording),
        tmp_path / "a.pcm",
        preprocessing=False,
        max_seconds=200,
        min_span=10,
        max_span=30,
    )
    merged = in_spans(recording, plan, engine, options)
    assert len(plan.spans) >= 5
    assert all(span.pause_after for span in plan.spans)
    assert merged.duration == plan.duration == pytest.approx(113, abs=1)
    assert wer(sample_text + human_text, merged.text) < 0.05
    words = [word for segment in merged.segments for word in segment.words or ()]
    assert "".join(word.word for word in words) == merged.text.replace(" ", "")
    times = [time for word in words for time in (word.start, word.end)]
    assert times == sorted(times)
    first_human = next(word for word in words if word.start > 60)
    assert first_human.start == pytest.approx(89, abs=2)
    assert sum(bool(segment.flags) for segment in merged.segments) <= 2  # ends of spans


GPL = Path("/usr/share/common-licenses/GPL-3")


@pytest.fixture
def read_aloud(ffmpeg: Ffmpeg, tmp_path: Path) -> tuple[Path, str]:
    """Return eleven minutes of two synthetic voices that take turns, and what they read."""
    flite = shutil.which("flite")
    if flite is None or not GPL.is_file():
        pytest.skip("Debian's flite, which speaks, or its copy of the GPL is not there")
    prose = re.sub(r"https?://\S+|[<>\"()]|\b\d+\.\s", " ", GPL.read_text().split("Preamble")[1])
    words = prose.split()
    texts = [" ".join(words[start : start + 250]) for start in range(0, 1500, 250)]
    inputs: list[object] = []
    for number, text in enumerate(texts):
        part, voice = tmp_path / f"{number}.wav", ("slt", "rms")[number % 2]
        how = ("-voice", voice, "--setf", "duration_stretch=1.2")
        subprocess.run([flite, *how, "-t", text, "-o", part], check=True)
        inputs += ["-i", part]
    graph = ("-filter_complex", f"concat=n={len(texts)}:v=0:a=1")
    return ffmpeg(*inputs, *graph, tmp_path / "all.wav"), " ".join(texts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_minutes_in_spans_say_what_the_whole_does(
    load: Load,
    wer: Wer,
    read_aloud: tuple[Path, str],
    tmp_path: Path,
) -> None:
    recording, text = read_aloud
    engine, options = load(FASTER_WHISPER, "base"), TranscriptionOptions()
    whole = transcribe_file(str(recording), options, engine=engine, max_seconds=1200)
    plan = prepare(str(recording), tmp_path / "a.pcm", preprocessing=False, max_seconds=1200)
    merged = in_spans(recording, plan, engine, options)
    assert plan.duration > 600
    assert len(plan.spans) >= 7
    errors_of_whole, errors_of_merged = wer(text, whole.text), wer(text, merged.text)
    difference = wer(whole.text, merged.text)
    assert errors_of_merged <= errors_of_whole + 0.01
    assert errors_of_whole < 0.06
    assert difference < 0.04  # where both are wrong, they differ


def test_importing_is_quick_and_loads_no_engine() -> None:
    script = (
        "import sys, modal_functions.merging, modal_functions.plan;"
        "assert 'numpy' not in sys.modules;"  # who merges may do without
        "import modal_functions.transcription, jobs.compute.packaged_weights;"
        "print({'torch', 'whisper', 'faster_whisper', 'ctranslate2', 'ffmpeg'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.strip() == "set()"
