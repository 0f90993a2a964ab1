"""What recordings look like: real recordings through real ffmpeg, and any samples at all."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from modal_functions.audio import SAMPLE_RATE, Pcm, decode_to_file, open_pcm
from modal_functions.transcription import prepare
from modal_functions.waveform import MOST_PEAKS, peaks


def test_loud_and_silent_parts_differ(
    ffmpeg: Callable[..., Path], sample: Path, tmp_path: Path
) -> None:
    """The sample, then as much silence."""
    recording = ffmpeg("-i", sample, "-t", 116.4, "-af", "apad", tmp_path / "half.wav")
    plan = prepare(str(recording), tmp_path / "a.pcm", preprocessing=False, max_seconds=600)
    assert plan.duration == pytest.approx(116.4, abs=0.1)
    assert len(plan.peaks) == MOST_PEAKS
    speech, silence = plan.peaks[:990], plan.peaks[1010:]
    assert max(silence) == 0
    assert 60 < max(speech) <= 255
    assert np.median(speech) > 10
    assert min(speech) < max(speech) / 4, "it pauses between its words"


@pytest.mark.parametrize("level", [1, 0.5, 0.1])
def test_the_full_range_is_255(ffmpeg: Callable[..., Path], tmp_path: Path, level: float) -> None:
    tone = f"sine=frequency=440:sample_rate=16000:duration=2,volume={8 * level}"  # it is 1/8 loud
    wav = ffmpeg("-f", "lavfi", "-i", tone, tmp_path / "tone.wav")
    decode_to_file(str(wav), tmp_path / "a.pcm", max_seconds=600)
    found = peaks(open_pcm(tmp_path / "a.pcm"), 20)
    assert found == pytest.approx([255 * level] * 20, abs=2)


@pytest.mark.parametrize("count", [1, 2, 1999, 2000, 2001, 12_345])
def test_there_are_at_most_2000(ffmpeg: Callable[..., Path], tmp_path: Path, count: int) -> None:
    noise = f"anoisesrc=sample_rate=16000:seed=1,atrim=end_sample={count}"
    wav = ffmpeg("-f", "lavfi", "-i", noise, "-c:a", "pcm_s16le", tmp_path / "short.wav")
    plan = prepare(str(wav), tmp_path / "a.pcm", preprocessing=False, max_seconds=600)
    assert plan.sample_count == count
    assert len(plan.peaks) == min(count, 2000)
    assert max(plan.peaks) > 50


@given(
    arrays.arrays(np.int16, st.integers(0, 500), elements=st.integers(-(2**15), 2**15 - 1)),
    st.integers(1, 50),
)
def test_each_is_the_largest_of_an_equal_share(pcm: Pcm, most: int) -> None:
    found = peaks(pcm, most)
    assert len(found) == min(most, len(pcm))
    for index, peak in enumerate(found):
        share = pcm[len(pcm) * index // len(found) : len(pcm) * (index + 1) // len(found)]
        assert len(pcm) // len(found) <= len(share) <= len(pcm) // len(found) + 1
        assert peak == round(max(abs(int(value)) for value in share) * 255 / 2**15)
        assert 0 <= peak <= 255


def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "four hours.pcm"
    with path.open("wb") as file:
        file.truncate(2 * 4 * 3600 * SAMPLE_RATE)  # nothing is on disk
        file.seek(-2, 2)
        file.write(b"\xff\x7f")
    tracemalloc.start()
    try:
        found = peaks(open_pcm(path))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (set(found[:-1]), found[-1]) == ({0}, 255)
    assert most < 2_000_000
