"""A recording to a transcript: as a whole, or in spans that are transcribed at the same time."""

from dataclasses import replace
from pathlib import Path

from modal_functions.audio import (
    SAMPLE_RATE,
    Samples,
    decode,
    decode_to_file,
    display_name,
    is_silent,
    open_pcm,
    read_span,
)
from modal_functions.doubts import flag_doubtful
from modal_functions.engines import Engine, ProgressCallback
from modal_functions.errors import NoSpeech
from modal_functions.merging import no_speech
from modal_functions.plan import Plan
from modal_functions.splitting import MAX_SECONDS, MIN_SECONDS, split
from modal_functions.steps import step
from modal_functions.transcript import Transcript, TranscriptionOptions
from modal_functions.waveform import peaks


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
        raise _silent(source)
    transcript = engine.transcribe(samples, options, on_progress=on_progress)
    if not transcript.has_speech:
        raise no_speech(display_name(source))
    return replace(transcript, segments=flag_doubtful(transcript.segments))


def prepare(  # noqa: PLR0913 - each has a name
    source: str,
    pcm: Path,
    *,
    preprocessing: bool,
    max_seconds: float,
    min_span: float = MIN_SECONDS,
    max_span: float = MAX_SECONDS,
) -> Plan:
    """Decode a local path or an http(s) URL to the file `pcm` and plan its spans.

    Spans are `min_span` to `max_span` seconds long, see `split`. Raises what `decode` raises, and
    NoSpeech for a silent recording; then there is no file.
    """
    with step("decode"):  # which is what fetches it, too
        decode_to_file(source, pcm, preprocessing=preprocessing, max_seconds=max_seconds)
    with step("plan"):
        spans = tuple(split(open_pcm(pcm), min_seconds=min_span, max_seconds=max_span))
        if all(is_silent(read_span(pcm, span)) for span in spans):
            pcm.unlink()
            raise _silent(source)
        return Plan(display_name(source), pcm, spans, peaks(open_pcm(pcm)))


def transcribe_chunk(
    samples: Samples,
    options: TranscriptionOptions,
    *,
    engine: Engine,
    on_progress: ProgressCallback | None = None,
) -> Transcript:
    """Transcribe the samples of one span, in times from its start; `merge` does the rest.

    Without speech the transcript is empty, and the engine is not asked about silence, which it
    could take for words. `on_progress` gets the share that is done, rising to 1.0. Raises
    InvalidOptions.
    """
    if not is_silent(samples):
        with step("transcribe"):
            transcript = engine.transcribe(samples, options, on_progress=on_progress)
        if transcript.has_speech:
            return transcript
    elif on_progress is not None:
        on_progress(1.0)
    return Transcript(
        text="",
        language=options.language or "",
        duration=len(samples) / SAMPLE_RATE,
        segments=(),
        engine=engine.name,
        model=engine.model,
    )


def _silent(source: str) -> NoSpeech:
    return NoSpeech(f"{display_name(source)} is silent. Check the microphone and record again.")
