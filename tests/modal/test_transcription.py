import json
import pickle
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modal_functions import errors
from modal_functions.engines import Engine
from modal_functions.errors import InvalidOptions, TranscriptionError
from modal_functions.transcript import (
    Segment,
    Transcript,
    TranscriptionOptions,
    Word,
    is_model_name,
    join_text,
)
from modal_functions.transcription import transcribe_file
from tests.modal.conftest import Ffmpeg, Wer

MAX_SECONDS = 60

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
        "InvalidOptions": "invalid_options",
        "ModelUnavailable": "model_unavailable",
    }
    retryable = {error for error in TranscriptionError.__subclasses__() if error.retryable}
    assert retryable == {errors.SourceUnavailable}


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
    assert transcript.duration == 17
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


def test_importing_is_quick_and_loads_no_engine() -> None:
    script = (
        "import sys, modal_functions.transcription, jobs.compute.packaged_weights;"
        "print({'torch', 'whisper', 'faster_whisper', 'ctranslate2', 'ffmpeg'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output.strip() == "set()"
