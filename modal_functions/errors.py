"""What can be wrong with a recording, its options or a model: one error each, with a stable code.

Messages are for the people who sent the recording: they name it by its base name, say which limit
was met and what to do, and never hold local paths, stack traces or raw output of ffmpeg.
All of them survive pickling: they travel between processes and back from Modal.
"""

from collections.abc import Sequence
from typing import ClassVar


class TranscriptionError(Exception):
    """A recording could not be transcribed."""

    code: ClassVar[str] = "transcription_error"
    retryable: ClassVar[bool] = False


class AudioFileNotFound(TranscriptionError):
    """There is no such file, or it may not be read."""

    code = "file_not_found"


class SourceUnavailable(TranscriptionError):
    """The server that holds the recording did not deliver it (all of it)."""

    code = "source_unavailable"
    retryable = True


class EmptyFile(TranscriptionError):
    """The file has no bytes."""

    code = "empty_file"


class InvalidAudio(TranscriptionError):
    """The file is not a recording that ffmpeg can read."""

    code = "invalid_audio"


class NoAudioStream(TranscriptionError):
    """The file is fine but has no sound track."""

    code = "no_audio_stream"


class EmptyAudio(TranscriptionError):
    """The sound track holds no samples."""

    code = "empty_audio"


class TruncatedAudio(TranscriptionError):
    """The file ends before the recording does."""

    code = "truncated_audio"


class AudioTooLong(TranscriptionError):
    """The recording is longer than the limit."""

    code = "audio_too_long"


class NoSpeech(TranscriptionError):
    """The recording is silent, or the engine heard nobody speak."""

    code = "no_speech"


class DecoderUnavailable(TranscriptionError):
    """This machine has no ffmpeg."""

    code = "decoder_unavailable"


class PreparedAudioGone(TranscriptionError):
    """What was decoded of the recording is no longer there; it has to be prepared again."""

    code = "prepared_audio_gone"
    retryable = True

    def __str__(self) -> str:
        return str(self.__doc__)


class InvalidOptions(TranscriptionError):
    """An option is unknown or has a value that is not allowed.

    `field` is its path, such as `options.language`; `allowed` says what it may be.
    """

    code = "invalid_options"

    def __init__(self, field: str, allowed: str) -> None:
        super().__init__(field, allowed)
        self.field = field
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.field}: {self.allowed}"


class ModelUnavailable(TranscriptionError):
    """The model is unknown, or its weights are not at hand or cannot be used.

    `at_hand` are the models that this machine can use now, `reason` is why this one is not.
    """

    code = "model_unavailable"

    def __init__(self, engine: str, model: str, reason: str, at_hand: Sequence[str] = ()) -> None:
        super().__init__(engine, model, reason, tuple(at_hand))
        self.engine = engine
        self.model = model
        self.reason = reason
        self.at_hand = tuple(at_hand)

    def __str__(self) -> str:
        models = ", ".join(self.at_hand) or "none"
        return (
            f"model {self.model!r} is not available for {self.engine}: {self.reason}. "
            f"Models at hand: {models}. To use another, let this machine download a known one, "
            f"or put its weights into the models directory under {self.engine}/."
        )
