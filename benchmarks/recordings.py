"""Recordings of which every word is known, and how many of them a transcript has wrong."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import jiwer

REPO = Path(__file__).parent.parent
GPL = Path("/usr/share/common-licenses/GPL-3")
LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")
VOICES = ("slt", "rms")


@dataclass(frozen=True)
class Recording:
    """A recording and what is said in it. ``source`` says for a report where it is from."""

    path: Path
    text: str
    seconds: float
    source: str


def ffmpeg_on_path(folder: Path) -> Path:
    """Make a folder that has ``ffmpeg``, for the PATH of programs that look for it there."""
    folder.mkdir(exist_ok=True)
    (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    return folder


def read_aloud(folder: Path, words: int) -> Recording:
    """Return so many words of the GPL, read by flite's two voices, or the sample over and over."""
    path, flite = folder / "recording.wav", shutil.which("flite")
    if flite is None or not GPL.is_file():
        return _repeat_sample(path, words)
    prose = re.sub(r"https?://\S+|[<>\"()]|\b\d+\.\s", " ", GPL.read_text().split("Preamble")[1])
    read = prose.split()[:words]
    parts, each = [], -(-words // len(VOICES))
    for number, voice in enumerate(VOICES):
        parts.append(folder / f"{voice}.wav")
        text = " ".join(read[number * each : (number + 1) * each])
        how = ("-voice", voice, "--setf", "duration_stretch=1.2", "-t", text, "-o", parts[-1])
        subprocess.run([flite, *how], check=True)
    _join(parts, path)
    source = f"the GPL's first {words} words, read by flite's voices {' and '.join(VOICES)}"
    return Recording(path, " ".join(read), seconds(path), source)


def _repeat_sample(path: Path, words: int) -> Recording:
    text = (REPO / "examples" / "sample.txt").read_text()
    times = max(1, round(words / len(text.split())))
    _join([REPO / "examples" / "sample.mp3"] * times, path)
    source = f"`examples/sample.mp3`, {times} times over, as there is no flite"
    return Recording(path, " ".join([text] * times), seconds(path), source)


def read_by_people(folder: Path) -> Recording | None:
    """Return the speech of Debian's package pocketsphinx-testdata; None if it is not installed."""
    if not (LIBRIVOX / "transcription").is_file():
        return None
    said = re.findall(r"<s> (.*) </s> \((.*)\)", (LIBRIVOX / "transcription").read_text())
    path = folder / "people.wav"
    _join([LIBRIVOX / f"{name}.wav" for _, name in said], path)
    source = "sentences of a LibriVox audiobook (Debian's pocketsphinx-testdata)"
    return Recording(path, " ".join(text for text, _ in said), seconds(path), source)


def _join(parts: Sequence[Path], path: Path) -> None:
    inputs = [argument for part in parts for argument in ("-i", str(part))]
    joined = f"concat=n={len(parts)}:v=0:a=1"
    how = ("-filter_complex", joined, "-ac", "1", "-ar", "16000", str(path))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *inputs, *how]
    subprocess.run(command, check=True)


def seconds(path: Path) -> float:
    """Return how long a recording is that was made here: 16 bits, mono, 16 kHz."""
    return (path.stat().st_size - 44) / 32000


def word_errors(text: str, said: str) -> float:
    """Return the word errors in percent, without punctuation and case."""
    plain = [" ".join(re.findall(r"[\w']+", words.casefold())) for words in (text, said)]
    return 100 * float(jiwer.wer(*plain))
