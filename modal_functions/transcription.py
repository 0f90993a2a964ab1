"""A recording to a transcript."""

from modal_functions.audio import decode, display_name, is_silent
from modal_functions.engines import Engine, ProgressCallback
from modal_functions.errors import NoSpeech
from modal_functions.transcript import Transcript, TranscriptionOptions


def transcribe_file(
    source: str,
    options: TranscriptionOptions,
    *,
    engine: Engine,
    max_seconds: float,
    on_progress: ProgressCallback | None = None,
) -> Transcript:
    """Transcribe a local path or an http(s) URL with a loaded engine.

    `on_progress` gets the share of the recording that is done, rising to 1.0. Raises what `decode`
    raises, InvalidOptions where the model cannot do what is asked, and NoSpeech.
    """
    samples = decode(source, preprocessing=options.preprocessing, max_seconds=max_seconds)
    if is_silent(samples):
        raise NoSpeech(f"{display_name(source)} is silent. Check the microphone and record again.")
    transcript = engine.transcribe(samples, options, on_progress=on_progress)
    if not any(char.isalnum() for char in transcript.text):  # noise may come out as dots
        raise NoSpeech(
            f"No speech was found in {display_name(source)}. If there is some, set "
            "options.language, or options.preprocessing for quiet speech."
        )
    return transcript
