"""Any recording as Whisper hears it: 16 kHz, mono, float32, decoded by one run of ffmpeg.

Recordings come from strangers: ffmpeg reads only real containers (no playlist, script or picture),
only over the protocols of their source, and not much more than `max_seconds` of them.

Times count from the start of the recording, as players show them: sound that starts later than
the picture is preceded by silence, and gaps (a muted caller sends nothing) are filled with it.
Nothing that can be decoded is dropped. A container's own start time (mpegts counts from 1.4 s) is
not counted.

Which files are recognised as cut off (tried with files cut in half, ffmpeg 5.1 and 9.0):

- by their declared length, with a tolerance of 1 s or 2 %: wav, flac, aiff, wavpack, mp3 with a
  Xing header (encoders write one), webm and mka with a length, m4a with the index in front or in
  fragments;
- by ffmpeg's word: webm without a length, webm and mp4 with pictures (whose sound may rightly be
  shorter), and mp4, m4a and mov with the index at their end, which is lost;
- not at all: ogg and opus, raw aac, mp3 without a Xing header, mpegts, avi, wma, caf, and wav that
  was written to a pipe. Their headers hold no length, or ffmpeg replaces it by an estimate.
"""

import os
import re
import shutil
import ssl
import struct
import subprocess
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePath
from typing import IO, Final
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from modal_functions import errors, plan

Samples = NDArray[np.float32]
Pcm = NDArray[np.int16]

SAMPLE_RATE: Final = plan.SAMPLE_RATE
SILENCE_PEAK: Final = 0.001  # -60 dBFS: below it there is at most the noise of a room

# For quiet and uneven speech. Rumble goes, then each stretch of about a second is brought to full
# scale, at most 50-fold; what stays below SILENCE_PEAK is noise and left alone. Measured with base
# in int8: no change on clean speech; where every other four seconds are 42 dB quieter, 51 % word
# errors become 6 % on examples/sample.mp3, and 17 % become 1.4 % on human speech.
CLEANING: Final = f"highpass=f=60,dynaudnorm=f=150:g=7:p=0.9:m=50:t={SILENCE_PEAK}"

# Containers of recordings. None makes ffmpeg open other files: mov could, but not by default.
_CONTAINERS: Final = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dts,eac3,flac,flv,matroska,mov,mp3,mpc,"
    "mpc8,mpeg,mpegts,ogg,tak,truehd,tta,voc,w64,wav,wv"
)
_URL: Final = re.compile(r"https?://", re.IGNORECASE)
_NETWORK_TIMEOUT: Final = 30  # seconds without a byte
_PIECE: Final = 2**18  # bytes read at a time
_WAV_HEAD: Final = 2**16  # bytes within which a wav file's samples start
_WAV_UNKNOWN_SIZE: Final = 0x7FFF0000  # who does not know the size writes 0 or something above

# What ffmpeg 5 and 9 write as warnings and errors, by what it means.
_MEANINGS: Final = {
    "estimated": re.compile("Estimating duration from bitrate"),
    "cut": re.compile("partial file|File ended prematurely"),
    "no index": re.compile("moov atom not found"),
    "guessed": re.compile("detected only with low score"),
    "network": re.compile(
        "Stream ends prematurely|Input/output error|IO error|Connection .*failed|timed out"
        "|Failed to resolve|certificate|TLS"
    ),
}
_PROBLEM: Final = re.compile(r"(\[[^\]]* @ [^\]]*\] )*\[(warning|error|fatal)\] ")
_CONTAINER: Final = re.compile(r"\[info\] Input #0, ([\w,]+), from ")
_DURATION: Final = re.compile(r"\[info\]   Duration: (\d+):(\d\d):(\d\d\.\d+),")
_TRACK: Final = re.compile(r"\[info\]   Stream #0:\d+.*?: (Audio|Video|Subtitle|Data|Attachment)")
_HTTP_STATUS: Final = re.compile(r"HTTP error (\d{3})")


def decode(source: str, *, preprocessing: bool = False, max_seconds: float) -> Samples:
    """Decode the first sound track of a local path or http(s) URL to samples from -1 to 1.

    `preprocessing` evens out the loudness of speech, see CLEANING. Raises AudioFileNotFound,
    SourceUnavailable, EmptyFile, InvalidAudio, NoAudioStream, EmptyAudio, TruncatedAudio,
    AudioTooLong or DecoderUnavailable.
    """
    pcm = bytearray()
    _decode(source, pcm.extend, preprocessing=preprocessing, max_seconds=max_seconds)
    return _to_float(np.frombuffer(pcm, "<i2"))


def decode_to_file(
    source: str, path: Path, *, preprocessing: bool = False, max_seconds: float
) -> int:
    """Decode as `decode` does, but to a file, in little memory; return the number of samples.

    The file holds 16-bit little-endian integers and nothing else: 115 MB an hour. Raises what
    `decode` does, and then leaves no file, as half a recording could be taken for all of it.
    """
    try:
        with path.open("wb") as file:
            _decode(source, file.write, preprocessing=preprocessing, max_seconds=max_seconds)
            return file.tell() // 2
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def open_pcm(path: Path) -> Pcm:
    """Map what `decode_to_file` wrote into memory: one 16-bit integer per sample."""
    return np.memmap(path, "<i2", mode="r")


def read_span(path: Path, span: plan.Span) -> Samples:
    """Read the samples of a span, from -1 to 1, from what `decode_to_file` wrote.

    Raises ValueError where the file does not hold all of them.
    """
    pcm = open_pcm(path)[span.start : span.end]
    if len(pcm) != span.end - span.start:
        raise ValueError(f"{path.name} ends before sample {span.end}")
    return _to_float(pcm)


def is_silent(samples: Samples) -> bool:
    """Whether nothing in the samples is louder than SILENCE_PEAK."""
    return samples.size == 0 or bool(max(samples.max(), -samples.min()) < SILENCE_PEAK)


def display_name(source: str) -> str:
    """Return the recording's base name: no folder, no server, no signature of a URL."""
    path = unquote(urlsplit(source).path) if _is_url(source) else source
    name = "".join(char for char in PurePath(path).name if char.isprintable())
    return f"'{name[-100:] or 'recording'}'"


def _to_float(pcm: Pcm) -> Samples:
    samples = pcm.astype(np.float32)
    samples /= 2**15
    return samples


def _decode(
    source: str, write: Callable[[bytes], object], *, preprocessing: bool, max_seconds: float
) -> None:
    """Give `write` the decoded samples, as 16-bit integers, and raise what `decode` does."""
    if not _is_url(source):
        source = str(Path(source).absolute())
        _check_file(source)
    limit = int(max_seconds * SAMPLE_RATE)
    report = _Report(source)
    command = _command(source, preprocessing=preprocessing, limit=limit)
    size, exit_code = _run(command, report, write, max_bytes=2 * limit)
    _check(report, seconds=size / 2 / SAMPLE_RATE, max_seconds=max_seconds, failed=exit_code)


def _is_url(source: str) -> bool:
    return _URL.match(source) is not None


def _check_file(source: str) -> None:
    path, name = Path(source), display_name(source)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise errors.AudioFileNotFound(f"{name} was not found or may not be read. Upload it again.")
    if path.stat().st_size == 0:
        raise errors.EmptyFile(f"{name} is empty (0 bytes). Upload it again.")


def find_ffmpeg() -> str:
    """Return the ffmpeg on PATH, or else the one in the package imageio-ffmpeg."""
    if executable := shutil.which("ffmpeg"):
        return executable
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as exc:
        raise errors.DecoderUnavailable(
            "This machine has no ffmpeg. Install ffmpeg, or the package imageio-ffmpeg."
        ) from exc


def _trusted_certificates() -> str | None:
    """Return the file of certificate authorities, which ffmpeg does not find by itself."""
    if file := ssl.get_default_verify_paths().cafile:  # SSL_CERT_FILE, or the system's
        return file
    try:
        import certifi
    except ImportError:
        return None
    return certifi.where()


def _input(source: str) -> dict[str, str]:
    """Return ffmpeg's options for a source: where it is, and what may be read from there."""
    if not _is_url(source):
        # "file:" keeps names that look like options or other protocols from being taken for them.
        return {"filename": f"file:{source}", "protocol_whitelist": "file"}
    options = {
        "filename": source,
        "protocol_whitelist": "https,http,tcp,tls",
        "rw_timeout": str(_NETWORK_TIMEOUT * 1_000_000),
    }
    if source.lower().startswith("https"):
        options["tls_verify"] = "1"  # ffmpeg's default is to trust any server
        if certificates := _trusted_certificates():
            options["ca_file"] = certificates
    return options


def _filters(*, preprocessing: bool, limit: int) -> str:
    """Return the filter chain; `limit` is in samples.

    Time stamps never go back, as aresample would drop that sound, nor jump beyond the limit, as
    filling the gap would take memory without bounds. Then gaps of more than 0.1 s are filled.
    """
    # The order of the arguments turns a missing time stamp (NaN) into the one that is due: ld(0).
    stamp = f"st(1,max(min({limit + SAMPLE_RATE},PTS),ld(0)));st(0,ld(1)+NB_SAMPLES);ld(1)"
    return (
        f"aformat=sample_rates={SAMPLE_RATE}:channel_layouts=mono,asetpts='{stamp}',"
        "aresample=async=1:first_pts=0" + (f",{CLEANING}" if preprocessing else "")
    )


def _command(source: str, *, preprocessing: bool, limit: int) -> list[str]:
    import ffmpeg

    recording = ffmpeg.input(**_input(source), format_whitelist=_CONTAINERS, threads=1)
    pcm = recording["a:0"].output(
        "pipe:1", format="s16le", af=_filters(preprocessing=preprocessing, limit=limit)
    )
    options = ["-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info"]
    command: list[str] = ffmpeg.compile(pcm, cmd=[find_ffmpeg(), *options])
    return command


def _run(
    command: list[str], report: "_Report", write: Callable[[bytes], object], *, max_bytes: int
) -> tuple[int, int]:
    """Run ffmpeg; return how many bytes it wrote and its exit code. It does not outlive this call.

    Reading stops soon after `max_bytes`, so memory or disk use is bounded by it.
    """
    size = 0
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        listener = threading.Thread(target=report.read, args=(process.stderr,), daemon=True)
        listener.start()
        try:
            while size <= max_bytes and (piece := process.stdout.read(_PIECE)):
                write(piece)
                size += len(piece)
            if size <= max_bytes:
                process.wait()
        finally:
            process.kill()  # does nothing where it has ended by itself
            listener.join()
    return size, process.returncode


@dataclass(slots=True)
class _Report:
    """What ffmpeg says about a source, reduced while it is read: its length has no bounds."""

    source: str
    container: str = ""  # ffmpeg's name of it; empty when it could not be opened
    tracks: list[str] = field(default_factory=list)  # Audio, Video, …, without cover pictures
    duration: float | None = None  # seconds, as the container declares
    http_status: int | None = None
    said: set[str] = field(default_factory=set)  # keys of _MEANINGS
    is_opening: bool = True

    def read(self, stream: IO[bytes]) -> None:
        """Read ffmpeg's standard error to its end."""
        for line in iter(lambda: stream.readline(_PIECE), b""):
            # Without the source, whose name could hold anything.
            self.note(line.decode(errors="replace").replace(self.source, ""))

    def note(self, line: str) -> None:
        """Take from a line what matters."""
        if _PROBLEM.match(line):
            self.said |= {key for key, meaning in _MEANINGS.items() if meaning.search(line)}
            if status := _HTTP_STATUS.search(line):
                self.http_status = int(status[1])
        elif self.is_opening:
            self._note_header(line)

    def _note_header(self, line: str) -> None:
        if container := _CONTAINER.match(line):
            self.container = container[1]
        elif (duration := _DURATION.match(line)) and self.duration is None:
            hours, minutes, seconds = map(float, duration.groups())
            self.duration = 3600 * hours + 60 * minutes + seconds
        elif (track := _TRACK.match(line)) and "(attached pic)" not in line:
            self.tracks.append(track[1])
        elif line.startswith("[info] Stream mapping:"):
            self.is_opening = False  # what follows is about the output

    def expected_seconds(self) -> float | None:
        """Return how long the sound should be, where the container knows that of the sound."""
        if self.container == "wav" and "estimated" in self.said:
            return _wav_seconds(_head(self.source))
        if self.tracks == ["Audio"] and "estimated" not in self.said:
            return self.duration
        return None


def _check(report: _Report, *, seconds: float, max_seconds: float, failed: int) -> None:
    """Raise what ffmpeg's report and the seconds of decoded sound amount to."""
    name = display_name(report.source)
    if _is_url(report.source):
        _check_transfer(report, name)
    if seconds > max_seconds:
        raise errors.AudioTooLong(
            f"{name} is {_length(report, max_seconds)} long, the limit is {_clock(max_seconds)}. "
            "Split it into shorter recordings."
        )
    if report.container and "Audio" not in report.tracks:
        raise errors.NoAudioStream(f"{name} has no sound track. Upload the one that has the sound.")
    if "no index" in report.said and "guessed" not in report.said:
        raise errors.TruncatedAudio(
            f"{name} is cut off: the index at its end is missing, without which nothing can be "
            "played. Upload it again."
        )
    if _is_truncated(report, seconds):
        raise errors.TruncatedAudio(
            f"{name} is cut off: after {_clock(seconds)} the file ends before the recording does. "
            "Upload it again. If there is no complete copy, `ffmpeg -i FILE NEW_FILE` saves what "
            "there is."
        )
    if failed or not report.container:
        raise errors.InvalidAudio(
            f"{name} is not a recording that ffmpeg can read. Upload audio or video, such as mp3, "
            "m4a, wav, flac, ogg, webm or mp4."
        )
    if seconds == 0:
        raise errors.EmptyAudio(f"{name} has a sound track without any sound. Record it again.")


def _check_transfer(report: _Report, name: str) -> None:
    if report.http_status in {HTTPStatus.NOT_FOUND, HTTPStatus.GONE}:
        raise errors.AudioFileNotFound(f"{name} was not found in the storage. Upload it again.")
    if report.http_status is not None:
        raise errors.SourceUnavailable(
            f"The storage refused to hand out {name} (HTTP {report.http_status})."
        )
    if "network" in report.said:
        raise errors.SourceUnavailable(
            f"{name} could not be fetched completely: its storage could not be reached or trusted, "
            "or the connection broke."
        )


def _is_truncated(report: _Report, seconds: float) -> bool:
    expected = report.expected_seconds()
    if expected is not None:
        return expected - seconds > max(1.0, 0.02 * expected)
    return "cut" in report.said


def _head(source: str) -> bytes:
    """Return the first bytes of a source."""
    if not _is_url(source):
        with Path(source).open("rb") as file:
            return file.read(_WAV_HEAD)
    request = urllib.request.Request(  # noqa: S310 - _is_url: http or https
        source, headers={"Range": f"bytes=0-{_WAV_HEAD - 1}"}
    )
    context = ssl.create_default_context(cafile=_trusted_certificates())
    try:
        with urllib.request.urlopen(  # noqa: S310
            request, timeout=_NETWORK_TIMEOUT, context=context
        ) as response:
            head: bytes = response.read(_WAV_HEAD)
            return head
    except OSError as exc:
        if isinstance(exc, HTTPError):
            exc.close()  # it is an open response, too
        raise errors.SourceUnavailable(
            f"{display_name(source)} could not be fetched: its storage could not be reached."
        ) from exc


def _wav_seconds(head: bytes) -> float | None:
    """Return a wav file's length by its header, None where the writer did not know it.

    ffmpeg does not tell: for a wav file that is too short it reports what is there.
    """
    position, bytes_per_second = 12, 0
    while position + 8 <= len(head):
        chunk, size = struct.unpack_from("<4sI", head, position)
        if chunk == b"fmt " and position + 20 <= len(head):
            (bytes_per_second,) = struct.unpack_from("<I", head, position + 16)
        if chunk == b"data":
            known = 0 < size < _WAV_UNKNOWN_SIZE and bytes_per_second
            return size / bytes_per_second if known else None
        position += 8 + size + size % 2
    return None


def _length(report: _Report, max_seconds: float) -> str:
    """Write how long a recording over the limit is, as far as that is known."""
    expected = report.expected_seconds() or 0
    return _clock(expected) if expected > max_seconds else f"more than {_clock(max_seconds)}"


def _clock(seconds: float) -> str:
    """Write seconds as 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
