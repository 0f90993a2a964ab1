"""Several windows of a span at a time through faster-whisper, which is what fills a GPU.

Whisper hears windows of 30 s. One after another, each starts where the text of the last one ended;
side by side they have to be cut before. They are cut in pauses and decoded without times: with
them a model may leave a window's end for the next window, and faster-whisper's pipeline then drops
it (of 1,500 words, 190; without times 5, as many as one after another). Segments are made of the
words' times.

The pipeline takes the first text that it gets. What Whisper would not take (it repeats itself, or
is unlikely) is decoded again by itself, which tries rising temperatures; so is what came to the
end of Whisper's memory, 224 tokens, as speech in scripts that take many of them does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from modal_functions.audio import Samples, is_silent
from modal_functions.splitting import split

Decode = Callable[[Samples, str], Iterable[Any]]
"""Decodes one window in a language, one after another; yields faster-whisper's segments."""

_MIN_SECONDS: Final = 14.0
MAX_SECONDS: Final = 29.0

# Whisper's own bounds, beyond which it decodes again or takes what it heard for silence.
_MAX_COMPRESSION_RATIO: Final = 2.4
_MIN_LOGPROB: Final = -1.0
_MAX_NO_SPEECH: Final = 0.6

_MAX_TOKENS: Final = 215  # 224, less what leads up to the text, and some more
_TIMESTAMPS: Final = 1501  # tokens, from 0 to 30 s in steps of 20 ms

_PAUSE: Final = 0.8  # seconds between two words that are two segments
_SENTENCE_ENDS: Final = frozenset(".?!…\u3002\uff1f\uff01")


def transcribe_windows(
    whisper: Any, samples: Samples, batch_size: int, decode: Decode, **decoding: Any
) -> tuple[Iterator[tuple[dict[str, Any], float]], str]:
    """Return segments, as mappings, with when their window ends in seconds, and the language.

    ``decoding`` are the pipeline's parameters, among them ``language``, ``None`` to detect it.
    ``decode`` is asked for windows whose text is not acceptable.
    """
    from faster_whisper import BatchedInferencePipeline

    windows = [
        span
        for span in split(samples, min_seconds=_MIN_SECONDS, max_seconds=MAX_SECONDS)
        if not is_silent(samples[span.start : span.end])
    ]
    if not windows:
        return iter(()), decoding["language"] or ""
    found, info = BatchedInferencePipeline(whisper).transcribe(
        samples,
        batch_size=batch_size,
        vad_filter=False,
        clip_timestamps=[dict(zip(("start", "end"), w.seconds, strict=True)) for w in windows],
        without_timestamps=True,
        word_timestamps=True,
        suppress_tokens=[-1, *_timestamps(whisper)],  # text behind one would be dropped
        **decoding,
    )

    def segments() -> Iterator[tuple[dict[str, Any], float]]:
        for span, segment in zip(windows, found, strict=True):
            start, end = span.seconds
            if not _is_acceptable(segment):
                again = decode(samples[span.start : span.end], info.language)
                yield from ((_moved(vars(part), start), end) for part in again)
            elif not _is_silence(segment):
                yield from ((part, end) for part in _sentences(vars(segment)))

    return segments(), info.language


def _timestamps(whisper: Any) -> range:
    first = whisper.hf_tokenizer.token_to_id("<|notimestamps|>") + 1
    return range(first, first + _TIMESTAMPS)


def _is_silence(segment: Any) -> bool:
    return bool(segment.no_speech_prob > _MAX_NO_SPEECH and segment.avg_logprob < _MIN_LOGPROB)


def _is_acceptable(segment: Any) -> bool:
    return _is_silence(segment) or bool(
        segment.compression_ratio <= _MAX_COMPRESSION_RATIO
        and segment.avg_logprob >= _MIN_LOGPROB
        and len(segment.tokens) <= _MAX_TOKENS
    )


def _moved(segment: Mapping[str, Any], offset: float) -> dict[str, Any]:
    words = segment["words"]
    if words is not None:
        words = [vars(w) | {"start": w.start + offset, "end": w.end + offset} for w in words]
    times = {"start": segment["start"] + offset, "end": segment["end"] + offset}
    return {**segment, **times, "words": words}


def _sentences(segment: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Divide a window's segment where a sentence ends or nobody speaks."""
    sentence: list[Any] = []
    for word in segment["words"]:
        if sentence and (
            word.start - sentence[-1].end >= _PAUSE
            or sentence[-1].word.rstrip()[-1:] in _SENTENCE_ENDS
        ):
            yield _segment_of(segment, sentence)
            sentence = []
        sentence.append(word)
    if sentence:
        yield _segment_of(segment, sentence)


def _segment_of(whole: Mapping[str, Any], words: list[Any]) -> dict[str, Any]:
    text = "".join(word.word for word in words)
    return {**whole, "start": words[0].start, "end": words[-1].end, "text": text, "words": words}
