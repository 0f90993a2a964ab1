"""Where to divide a long recording: in the middle of pauses.

Each cut is looked for between a minimum and a maximum after the one before, and never leaves less
than the minimum behind it. So all spans keep the bounds, and only a recording that is no longer
than the maximum, which is not cut, may be a shorter one. The last two spans share what is left.

A pause is a stretch near the local noise floor: near the quietest place within reach, which must
lie well below the loudest sounds there. Loudness alone says nothing: a steady tone or engine is
loud throughout and has no pause, and quiet speech stays above the noise it is spoken in. The
longest pause wins. Where there is none, the cut is at the quietest place near the maximum.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from modal_functions.audio import SAMPLE_RATE, SILENCE_PEAK, Pcm, Samples
from modal_functions.plan import Span

# Measured on two cores with base in faster-whisper and two processes, on 11.6 minutes of synthetic
# speech: 28 s and 5.4 % word errors, against 48 s and 4.1 % for the whole in one process. Another
# voice reading other text: 26 s and 3.8 % against 43 s and 3.6 %; a third recording had the same
# errors both ways. On the first, spans of 10 to 30 s took 41 s, as Whisper fills up each to 30 s
# (4.8 %), and of 100 to 300 s took 28 s (3.9 %): longer ones are not faster, lose more when they
# are interrupted, and leave cores idle at the end. Not measured on a GPU.
MIN_SECONDS: Final = 30.0
MAX_SECONDS: Final = 90.0

_FRAME: Final = 320  # samples: 20 ms
_FRAMES_A_SECOND: Final = SAMPLE_RATE // _FRAME
_BLOCK: Final = 3000 * _FRAME  # samples measured at a time: a minute
_PAUSE: Final = 15  # frames: 0.3 s; what is shorter may be the stop in "a pt" or "a book"
_NEAR: Final = 10 * _FRAMES_A_SECOND  # how far before the maximum a place without pause may be
_MIN_RANGE: Final = 10  # dB; with less between quiet and loud, all of it is noise, tone or speech
_NOISE_RANGE: Final = 10  # dB; how far noise rises above its floor, where speech is much louder
_FLOOR_POWER: Final = 1e-7  # -70 dBFS: digital silence must not make a room's noise look loud
_SILENCE_POWER: Final = SILENCE_PEAK**2

_Levels = NDArray[np.float32]


def split(
    samples: Pcm | Samples, *, min_seconds: float = MIN_SECONDS, max_seconds: float = MAX_SECONDS
) -> list[Span]:
    """Divide samples, which may be mapped from a file, into spans of the given length in seconds.

    The spans cover every sample exactly once, in order. Memory is bounded by a minute of samples
    and 700 kB for each hour. Raises ValueError unless the maximum is at least twice the minimum,
    both in whole frames of 20 ms within the bounds: less leaves what cannot be divided.
    """
    shortest = -int(-min_seconds * SAMPLE_RATE // _FRAME)
    longest = int(max_seconds * SAMPLE_RATE // _FRAME)
    if not 0 < 2 * shortest <= longest:
        raise ValueError("max_seconds must be at least twice min_seconds")
    powers = _powers(samples)
    spans: list[Span] = []
    start = 0
    while len(samples) - start * _FRAME > longest * _FRAME:
        latest = min(start + longest, len(samples) // _FRAME - shortest)
        around = powers[start : start + longest + _PAUSE]
        cut, is_pause = _best_cut(around, shortest, latest - start)
        spans.append(Span(start * _FRAME, (start + cut) * _FRAME, pause_after=is_pause))
        start += cut
    if len(samples) > 0:
        spans.append(Span(start * _FRAME, len(samples)))
    return spans


def _powers(samples: Pcm | Samples) -> _Levels:
    """Return each whole frame's mean power; a constant offset of the recording is not counted."""
    scale = 2**-15 if samples.dtype == np.int16 else 1
    powers = np.empty(len(samples) // _FRAME, np.float32)
    for start in range(0, len(powers) * _FRAME, _BLOCK):
        block = samples[start : min(start + _BLOCK, len(powers) * _FRAME)].astype(np.float32)
        block *= np.float32(scale)
        first = start // _FRAME
        powers[first : first + len(block) // _FRAME] = block.reshape(-1, _FRAME).var(axis=1)
    return powers


def _best_cut(powers: _Levels, earliest: int, latest: int) -> tuple[int, bool]:
    """Return the frame to cut before, `earliest` to `latest`, and whether it is in a pause.

    `powers` start where the span does and end a little after it may.
    """
    smooth = np.convolve(powers, np.full(_PAUSE, 1 / _PAUSE, np.float32), "same")
    window = slice(earliest, latest + 1)
    noise = _noise_power(float(smooth[window].min()), float(np.percentile(powers, 99)))
    edges = np.flatnonzero(np.diff(powers[window] < noise, prepend=False, append=False))
    pauses = [(end - start, start) for start, end in edges.reshape(-1, 2).tolist()]
    length, start = max(pauses, default=(0, 0))
    if length >= _PAUSE - 1:  # one that starts within a frame has one whole frame less
        return earliest + start + length // 2, True
    near = max(earliest, latest - _NEAR)
    return near + int(smooth[near : latest + 1].argmin()), False


def _noise_power(floor: float, loud: float) -> float:
    """Return the power below which there is only noise, by the quietest and the loudest places."""
    floor = max(_FLOOR_POWER, floor)
    above = 10 * np.log10(max(floor, loud) / floor)
    if above < _MIN_RANGE:
        return _SILENCE_POWER
    return float(floor * 10 ** (min(_NOISE_RANGE, above / 4) / 10))
