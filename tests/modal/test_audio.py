import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import tracemalloc
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from modal_functions.audio import (
    SAMPLE_RATE,
    decode,
    decode_to_file,
    display_name,
    is_silent,
    open_pcm,
    read_span,
)
from modal_functions.engines import Engine
from modal_functions.errors import TranscriptionError
from modal_functions.plan import Span
from modal_functions.splitting import split
from modal_functions.transcript import TranscriptionOptions
from tests.modal.conftest import Ffmpeg, Wer

MAX_SECONDS = 60
CLIP_SECONDS = 17

Make = Callable[[Path], object]

PICTURE = ("-f", "lavfi", "-i", "testsrc=size=160x120:rate=10")
COVER = ("-disposition:v", "attached_pic")


def seconds(source: object, *, preprocessing: bool = False) -> float:
    samples = decode(str(source), max_seconds=MAX_SECONDS, preprocessing=preprocessing)
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert np.abs(samples).max() <= 1
    return len(samples) / SAMPLE_RATE


def refusal(source: object, *, max_seconds: float = MAX_SECONDS) -> TranscriptionError:
    """Return the error, after checking what must never be in its message."""
    with pytest.raises(TranscriptionError) as caught:
        decode(str(source), max_seconds=max_seconds)
    message = str(caught.value)
    assert str(Path(str(source)).parent) not in message
    assert Path(str(source).partition("?")[0]).name in message
    for raw in ("0x", "[error]", "ffmpeg version", "Traceback", "libav", "/tmp", "token"):
        assert raw not in message
    return caught.value


# What can be read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.wav", ()),
        ("a.mp3", ("-b:a", "64k")),
        ("a.m4a", ("-c:a", "aac")),
        ("a.ogg", ("-c:a", "libopus")),
        ("a.flac", ()),
        ("a.webm", ("-c:a", "libopus")),
        ("a.mp4", (*PICTURE, "-shortest", "-c:a", "aac")),
        ("stereo.wav", ("-ac", 2, "-ar", 44100)),
    ],
)
def test_formats_sound_the_same(
    name: str,
    arguments: tuple[object, ...],
    clip: Path,
    clip_text: str,
    quick: Engine,
    ffmpeg: Ffmpeg,
    wer: Wer,
    tmp_path: Path,
) -> None:
    recording = ffmpeg("-i", clip, *arguments, tmp_path / name)
    samples = decode(str(recording), max_seconds=MAX_SECONDS)
    assert len(samples) / SAMPLE_RATE == pytest.approx(CLIP_SECONDS, abs=0.2)
    assert wer(clip_text, quick.transcribe(samples, TranscriptionOptions()).text) < 0.12


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cover.mp3", ("-i", "{cover}", "-map", 0, "-map", 1, *COVER)),
        ("cover.m4a", ("-i", "{cover}", "-map", 0, "-map", 1, "-c:v", "copy", *COVER)),
        ("vbr.mp3", ("-q:a", 5)),
        ("vbr without xing.mp3", ("-q:a", 5, "-write_xing", 0, "-id3v2_version", 0)),
        ("long picture.mp4", (*PICTURE, "-t", 30, "-c:a", "aac")),
        ("long picture.webm", (*PICTURE, "-t", 30, "-c:a", "libopus", "-c:v", "libvpx")),
        ("without length.webm", ("-c:a", "libopus", "-f", "webm", "-live", 1)),
        ("vorbis.ogg", ("-c:a", "libvorbis")),
        ("fragments.mp4", ("-c:a", "aac", "-movflags", "frag_keyframe+empty_moov")),
        ("a.aac", ()),
        ("a.aiff", ()),
        ("a.wma", ()),
        ("a.ts", ("-c:a", "aac")),
        ("a.avi", ("-c:a", "libmp3lame")),
        ("a.caf", ()),
        ("two tracks.mka", ("-i", "{clip}", "-map", 0, "-map", 1, "-c:a", "flac")),
    ],
)
def test_whole_recordings_are_not_taken_for_truncated(
    name: str, arguments: tuple[object, ...], clip: Path, ffmpeg: Ffmpeg, tmp_path: Path
) -> None:
    cover = ffmpeg(*PICTURE, "-frames:v", 1, tmp_path / "cover.png")
    given = [str(argument).format(cover=cover, clip=clip) for argument in arguments]
    recording = ffmpeg("-i", clip, *given, tmp_path / name)
    assert seconds(recording) == pytest.approx(CLIP_SECONDS, abs=0.3)


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF - 36, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_wav_whose_writer_did_not_know_the_size_is_whole(
    size: int, clip: Path, tmp_path: Path
) -> None:
    data = bytearray(clip.read_bytes())
    position = data.index(b"data") + 4
    data[position : position + 4] = size.to_bytes(4, "little")
    (tmp_path / "piped.wav").write_bytes(data)
    assert seconds(tmp_path / "piped.wav") == pytest.approx(CLIP_SECONDS, abs=0.01)


@pytest.mark.parametrize("name", ["-i", "concat:a|b", "it's 50% [a].mp3", "http:x", "ä 音.mp3"])
def test_names_are_only_names(
    name: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(clip, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert seconds(name) == pytest.approx(CLIP_SECONDS, abs=0.01)


def test_sound_after_the_picture_keeps_its_time(clip: Path, ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    late = ffmpeg(
        *PICTURE, "-itsoffset", 5, "-i", clip, "-t", 20, "-c:a", "aac", tmp_path / "late.mp4"
    )
    samples = decode(str(late), max_seconds=MAX_SECONDS)
    assert len(samples) / SAMPLE_RATE == pytest.approx(20, abs=0.1)
    assert is_silent(samples[: int(4.9 * SAMPLE_RATE)])
    assert not is_silent(samples[: int(5.5 * SAMPLE_RATE)])


def test_gaps_are_filled_with_silence(clip: Path, ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    """A caller who is muted sends nothing; what comes after keeps its time."""
    muted = "aselect='not(between(t,6,12))'"
    gap = ffmpeg("-i", clip, "-af", muted, "-c:a", "libopus", tmp_path / "gap.webm")
    samples = decode(str(gap), max_seconds=MAX_SECONDS)
    assert len(samples) / SAMPLE_RATE == pytest.approx(CLIP_SECONDS, abs=0.1)
    assert is_silent(samples[int(6.1 * SAMPLE_RATE) : int(11.9 * SAMPLE_RATE)])
    whole = decode(str(clip), max_seconds=MAX_SECONDS)
    after = slice(13 * SAMPLE_RATE, 16 * SAMPLE_RATE)
    loudness = [np.abs(x[after]).reshape(-1, SAMPLE_RATE // 20).mean(1) for x in (samples, whole)]
    assert np.corrcoef(*loudness)[0, 1] > 0.9


def test_time_stamps_that_go_back_lose_no_sound(clip: Path, ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    back = "asetpts='if(gt(T,8),PTS-5*SR,PTS)'"
    recording = ffmpeg("-i", clip, "-af", back, "-c:a", "pcm_s16le", tmp_path / "back.mka")
    assert seconds(recording) == pytest.approx(CLIP_SECONDS, abs=0.1)


def test_first_of_two_sound_tracks_is_heard(clip: Path, ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    silence = ("-f", "lavfi", "-t", CLIP_SECONDS, "-i", "anullsrc=r=16000:cl=mono")
    tracks = ffmpeg(
        *silence, "-i", clip, "-map", 0, "-map", 1, "-c:a", "flac", tmp_path / "two.mka"
    )
    assert is_silent(decode(str(tracks), max_seconds=MAX_SECONDS))


def test_ffmpeg_of_the_package_serves_where_none_is_installed(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imageio_ffmpeg", reason="the package is optional where ffmpeg is there")
    monkeypatch.setenv("PATH", "")
    assert seconds(clip) == pytest.approx(CLIP_SECONDS, abs=0.01)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(TranscriptionError, match="Install ffmpeg") as caught:
        seconds(clip)
    assert caught.value.code == "decoder_unavailable"


# What cannot --------------------------------------------------------------------------------------


def write_wav(path: Path, frames: bytes, *, said_frames: int | None = None) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        file.writeframes(frames)
    if said_frames is not None:
        data = bytearray(path.read_bytes())
        data[40:44] = (2 * said_frames).to_bytes(4, "little")
        path.write_bytes(data)


NOISE = np.random.default_rng(0)

UNREADABLE: dict[str, Make] = {
    f"text.{suffix}": lambda path: path.write_text("Minutes of the meeting.\n" * 100)
    for suffix in ("aac", "ac3", "amr", "flac", "gsm", "m4a", "mp3", "ogg", "ts", "txt", "wav")
} | {
    "noise.mp3": lambda path: path.write_bytes(NOISE.bytes(300_000)),
    "noise.m4a": lambda path: path.write_bytes(NOISE.bytes(30_000)),
    "noise.wav": lambda path: path.write_bytes(NOISE.bytes(30_000)),
    "zeros.mp3": lambda path: path.write_bytes(bytes(100_000)),
    "program.mp3": lambda path: shutil.copy(sys.executable, path),
    "document.mp3": lambda path: path.write_bytes(b"%PDF-1.7\n" + bytes(1000)),
    "archive.mp3": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(1000)),
    "subtitles.mp3": lambda path: path.write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n"),
    "start.flac": lambda path: path.write_bytes(b"fLaC" + bytes(20)),
    "start.wav": lambda path: path.write_bytes(b"RIFF\xff\xff\0\0WAVE"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_recording_is_refused(name: str, tmp_path: Path) -> None:
    UNREADABLE[name](tmp_path / name)
    error = refusal(tmp_path / name)
    assert error.code == "invalid_audio"
    assert not error.retryable
    assert "mp3, m4a, wav" in str(error)


def test_pictures_are_refused(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    for format_, name in (("png", "png.mp3"), ("mjpeg", "jpeg.mp3"), ("gif", "gif.mp3")):
        ffmpeg(*PICTURE, "-frames:v", 1, "-c:v", format_, "-f", "image2", tmp_path / "picture")
        (tmp_path / "picture").rename(tmp_path / name)
        assert refusal(tmp_path / name).code == "invalid_audio"


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:17\n#EXTINF:17,\n{secret}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {secret}\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
    "dash": (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
        '<Period><AdaptationSet mimeType="audio/wav"><Representation id="1" bandwidth="1">'
        "<BaseURL>file://{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    ),
    "m3u": "{secret}\n",
}


@pytest.mark.parametrize("suffix", ["mp3", "m3u8", "wav"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_playlists_cannot_read_other_files(
    kind: str, suffix: str, clip: Path, tmp_path: Path
) -> None:
    secret = shutil.copy(clip, tmp_path / "secret.wav")
    playlist = tmp_path / f"upload.{suffix}"
    playlist.write_text(PLAYLISTS[kind].format(secret=secret))
    assert refusal(playlist).code == "invalid_audio"


def test_video_without_sound_is_refused(ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    for name in ("mute.mp4", "mute.webm"):
        error = refusal(ffmpeg(*PICTURE, "-t", 3, tmp_path / name))
        assert error.code == "no_audio_stream"
        assert "no sound track" in str(error)


def test_absent_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.mp3").mkdir()
    os.mkfifo(tmp_path / "pipe.mp3")
    for name in ("absent.mp3", "folder.mp3", "pipe.mp3"):
        assert refusal(tmp_path / name).code == "file_not_found"


def test_empty_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mp3").touch()
    error = refusal(tmp_path / "empty.mp3")
    assert error.code == "empty_file"
    assert "0 bytes" in str(error)


def test_recordings_without_samples_are_refused(tmp_path: Path) -> None:
    write_wav(tmp_path / "header.wav", b"")
    assert refusal(tmp_path / "header.wav").code == "empty_audio"


# Too long -----------------------------------------------------------------------------------------


def test_too_long_recordings_are_refused_with_limit_and_length(sample: Path) -> None:
    error = refusal(sample, max_seconds=30)
    assert error.code == "audio_too_long"
    assert "0:00:30" in str(error)
    assert "0:00:58" in str(error)


def test_length_that_nobody_knows_is_limited_too(
    clip: Path, ffmpeg: Ffmpeg, tmp_path: Path
) -> None:
    live = ("-c:a", "libopus", "-f", "webm", "-live", 1)
    error = refusal(ffmpeg("-i", clip, *live, tmp_path / "live.webm"), max_seconds=10)
    assert error.code == "audio_too_long"
    assert "more than 0:00:10" in str(error)


def test_recording_as_long_as_the_limit_is_read(clip: Path) -> None:
    assert len(decode(str(clip), max_seconds=CLIP_SECONDS)) == CLIP_SECONDS * SAMPLE_RATE


def test_gap_of_a_day_takes_no_more_than_the_limit(
    clip: Path, ffmpeg: Ffmpeg, tmp_path: Path
) -> None:
    jump = "asetpts='PTS+gt(T,8)*72000*SR'"
    recording = ffmpeg("-i", clip, "-af", jump, "-c:a", "pcm_s16le", tmp_path / "gap.mka")
    assert refusal(recording).code == "audio_too_long"


# Cut off ------------------------------------------------------------------------------------------


def cut(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.wav", ()),
        ("a.mp3", ()),
        ("vbr.mp3", ("-q:a", 5)),
        ("a.m4a", ("-c:a", "aac")),
        ("fast.m4a", ("-c:a", "aac", "-movflags", "faststart")),
        ("fragments.mp4", ("-c:a", "aac", "-movflags", "frag_keyframe+empty_moov")),
        ("fast.mp4", (*PICTURE, "-shortest", "-c:a", "aac", "-movflags", "faststart")),
        ("a.flac", ()),
        ("a.aiff", ()),
        ("a.webm", ("-c:a", "libopus")),
        ("live.webm", ("-c:a", "libopus", "-live", 1)),
        ("picture.webm", (*PICTURE, "-shortest", "-c:a", "libopus", "-c:v", "libvpx")),
    ],
)
def test_truncated_recordings_are_refused(
    name: str,
    arguments: tuple[object, ...],
    share: float,
    clip: Path,
    ffmpeg: Ffmpeg,
    tmp_path: Path,
) -> None:
    error = refusal(cut(ffmpeg("-i", clip, *arguments, tmp_path / name), share))
    assert error.code == "truncated_audio"
    assert "Upload it again" in str(error)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("a.opus", ("-c:a", "libopus")),
        ("a.ogg", ("-c:a", "libvorbis")),
        ("without xing.mp3", ("-write_xing", 0, "-id3v2_version", 0)),
        ("a.aac", ()),
        ("a.ts", ("-c:a", "aac")),
        ("a.wma", ()),
        ("a.caf", ()),
    ],
)
def test_truncation_that_cannot_be_seen_gives_what_is_there(
    name: str, arguments: tuple[object, ...], clip: Path, ffmpeg: Ffmpeg, tmp_path: Path
) -> None:
    recording = cut(ffmpeg("-i", clip, *arguments, tmp_path / name), 0.5)
    assert seconds(recording) == pytest.approx(CLIP_SECONDS / 2, abs=2)


def test_wav_whose_sound_starts_late_is_read(clip: Path, tmp_path: Path) -> None:
    data = clip.read_bytes()
    junk = b"JUNK" + (2**17).to_bytes(4, "little") + bytes(2**17)
    (tmp_path / "a.wav").write_bytes(data[:36] + junk + data[36 : len(data) // 2])
    assert seconds(tmp_path / "a.wav") == pytest.approx(CLIP_SECONDS / 2, abs=0.1)


def test_a_last_second_that_is_missing_is_tolerated(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", bytes(2 * 16 * SAMPLE_RATE), said_frames=17 * SAMPLE_RATE)
    assert seconds(tmp_path / "a.wav") == 16


# Hostile input ------------------------------------------------------------------------------------


def test_a_flood_of_complaints_does_not_block(sample: Path, tmp_path: Path) -> None:
    """ffmpeg writes far more than a pipe holds about a recording with a broken byte everywhere."""
    data = np.frombuffer(sample.read_bytes() * 10, np.uint8).copy()
    data[5000::50] ^= 0xFF
    (tmp_path / "broken.mp3").write_bytes(data.tobytes())
    try:
        assert seconds(tmp_path / "broken.mp3") > 1
    except TranscriptionError as error:
        assert error.code in {"invalid_audio", "truncated_audio", "audio_too_long"}  # noqa: PT017


def test_labels_cannot_speak_for_ffmpeg(clip: Path, ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    lies = "x\n[error] partial file\n[info]   Duration: 09:00:00.00, start\n[error] HTTP error 404"
    labelled = ffmpeg("-i", clip, "-metadata", f"title={lies}", tmp_path / "partial file.mp3")
    assert seconds(labelled) == pytest.approx(CLIP_SECONDS, abs=0.2)


# From a server ------------------------------------------------------------------------------------


class Storage(ThreadingHTTPServer):
    """Serves a folder, and behaves badly under some names."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.asked = threading.Event()
        self.hung_up = threading.Event()

    def url(self, name: str, scheme: str = "http") -> str:
        return f"{scheme}://127.0.0.1:{self.server_port}/{name}?token=secret"


class Answer(BaseHTTPRequestHandler):
    server: Storage

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/").partition("?")[0]
        if name.isdigit():
            self.send_error(int(name))
        elif name == "elsewhere":
            self.send_response(302)
            self.send_header("Location", f"file://{self.server.folder}/a.mp3")
            self.end_headers()
        elif name.startswith("endless"):
            self.give_without_end()
        elif name == "picky.wav" and "Lavf" not in self.headers["User-Agent"]:
            self.send_error(403)
        else:
            self.give(name.removeprefix("broken-"), break_off=name.startswith("broken-"))

    def give(self, name: str, *, break_off: bool) -> None:
        data = (self.server.folder / name).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : len(data) // 2 if break_off else None])

    def give_without_end(self) -> None:
        """Send sound and wait (endless-wait), or sound for ever, until the client hangs up."""
        self.send_response(200)
        self.end_headers()
        write_wav(self.server.folder / "head", b"\1\1" * SAMPLE_RATE, said_frames=0)
        self.wfile.write((self.server.folder / "head").read_bytes())
        self.server.asked.set()
        try:
            while "wait" not in self.path:
                self.wfile.write(b"\1\1" * SAMPLE_RATE)
            self.connection.recv(1)
        except OSError:
            pass
        self.server.hung_up.set()


@contextmanager
def serving(folder: Path, certificate: Path | None = None) -> Iterator[Storage]:
    with Storage(folder) as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def storage(clip: Path, ffmpeg: Ffmpeg, tmp_path: Path) -> Iterator[Storage]:
    ffmpeg("-i", clip, tmp_path / "a.mp3")
    ffmpeg("-i", clip, "-c:a", "aac", tmp_path / "a.m4a")
    shutil.copy(clip, tmp_path / "a.wav")
    cut(Path(shutil.copy(clip, tmp_path / "cut.wav")), 0.5)
    shutil.copy(tmp_path / "cut.wav", tmp_path / "picky.wav")
    (tmp_path / "list.mp3").write_text(PLAYLISTS["hls"].format(secret=tmp_path / "a.wav"))
    with serving(tmp_path) as server:
        yield server


@pytest.mark.parametrize("name", ["a.mp3", "a.m4a", "a.wav"])
def test_urls_are_read(name: str, storage: Storage) -> None:
    assert seconds(storage.url(name)) == pytest.approx(CLIP_SECONDS, abs=0.2)


@pytest.mark.parametrize(
    ("name", "code", "retryable"),
    [
        ("404", "file_not_found", False),
        ("403", "source_unavailable", True),
        ("503", "source_unavailable", True),
        ("broken-a.mp3", "source_unavailable", True),
        ("cut.wav", "truncated_audio", False),
        ("picky.wav", "source_unavailable", True),  # what is left to know is not given to Python
        ("list.mp3", "invalid_audio", False),
        ("elsewhere", "invalid_audio", False),
    ],
)
def test_what_a_server_may_do(name: str, code: str, storage: Storage, *, retryable: bool) -> None:
    error = refusal(storage.url(name))
    assert (error.code, error.retryable) == (code, retryable)
    assert "127.0.0.1" not in str(error)


def test_a_server_that_is_not_there_may_be_tried_again() -> None:
    error = refusal("http://127.0.0.1:9/a.mp3?token=secret")
    assert (error.code, error.retryable) == ("source_unavailable", True)


def test_an_endless_stream_is_left(storage: Storage) -> None:
    assert refusal(storage.url("endless"), max_seconds=5).code == "audio_too_long"
    assert storage.hung_up.wait(20)


def test_ffmpeg_ends_with_an_interrupted_caller(storage: Storage) -> None:
    call = f"decode({storage.url('endless-wait')!r}, max_seconds=9)"
    script = f"from modal_functions.audio import decode; {call}"
    with subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True
    ) as caller:
        assert storage.asked.wait(60)
        assert not storage.hung_up.is_set()
        caller.send_signal(signal.SIGINT)
        assert storage.hung_up.wait(20)
    assert caller.returncode != 0


def test_only_trusted_servers_are_read(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    shutil.copy(clip, tmp_path / "a.wav")
    certificate = tmp_path / "certificate.pem"
    command = [
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    public = tmp_path / "public.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(certificate), "-out", str(public)]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    with certificate.open("ab") as file:
        file.write(public.read_bytes())
    with serving(tmp_path, certificate) as server:
        url = server.url("a.wav", scheme="https")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "absent.pem"))
        assert refusal(url).code == "source_unavailable"
        monkeypatch.setenv("SSL_CERT_FILE", str(public))
        assert seconds(url) == CLIP_SECONDS


# To a file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preprocessing", [False, True])
@pytest.mark.parametrize(
    ("name", "arguments"), [("a.wav", ()), ("a.mp3", ()), ("a.webm", ("-c:a", "libopus"))]
)
def test_a_file_holds_the_same_samples(
    name: str,
    arguments: tuple[object, ...],
    clip: Path,
    ffmpeg: Ffmpeg,
    tmp_path: Path,
    *,
    preprocessing: bool,
) -> None:
    recording, pcm = str(ffmpeg("-i", clip, *arguments, tmp_path / name)), tmp_path / "a.pcm"
    samples = decode(recording, preprocessing=preprocessing, max_seconds=MAX_SECONDS)
    pcm.write_text("what was there before")
    count = decode_to_file(recording, pcm, preprocessing=preprocessing, max_seconds=MAX_SECONDS)
    assert count == len(samples) == len(open_pcm(pcm))
    middle = Span(count // 3, count // 2)
    for span in (Span(0, count), middle, Span(count - 1, count), Span(0, 0)):
        read = read_span(pcm, span)
        assert read.dtype == np.float32
        assert np.array_equal(read, samples[span.start : span.end])


def test_a_file_that_is_too_short_is_noticed(clip: Path, tmp_path: Path) -> None:
    pcm = tmp_path / "a.pcm"
    count = decode_to_file(str(clip), pcm, max_seconds=MAX_SECONDS)
    os.truncate(pcm, count)
    with pytest.raises(ValueError, match=f"a.pcm ends before sample {count}"):
        read_span(pcm, Span(0, count))


def test_what_is_refused_leaves_no_file(clip: Path, ffmpeg: Ffmpeg, tmp_path: Path) -> None:
    long = ffmpeg("-i", clip, "-c:a", "libopus", tmp_path / "long.ogg")
    short = cut(ffmpeg("-i", clip, tmp_path / "cut.flac"), 0.5)
    text = tmp_path / "text.mp3"
    text.write_text("Minutes of the meeting.")
    write_wav(tmp_path / "header.wav", b"")
    for source, code in (
        (tmp_path / "absent.mp3", "file_not_found"),
        (tmp_path / "header.wav", "empty_audio"),
        (text, "invalid_audio"),
        (short, "truncated_audio"),
        (long, "audio_too_long"),
    ):
        with pytest.raises(TranscriptionError) as caught:
            decode_to_file(str(source), tmp_path / "a.pcm", max_seconds=10)
        assert caught.value.code == code
        assert not (tmp_path / "a.pcm").exists()


def test_hours_are_decoded_and_divided_in_little_memory(tmp_path: Path) -> None:
    hours, size = 3, 3 * 3600 * SAMPLE_RATE
    write_wav(tmp_path / "long.wav", b"", said_frames=size)
    os.truncate(tmp_path / "long.wav", 44 + 2 * size)  # all silence, and hardly any disk
    tracemalloc.start()
    try:
        count = decode_to_file(
            str(tmp_path / "long.wav"), tmp_path / "a.pcm", max_seconds=hours * 3600
        )
        spans = split(open_pcm(tmp_path / "a.pcm"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert spans[-1].end == count == size
    assert peak < 40 * 10**6


# Loudness -----------------------------------------------------------------------------------------


def test_silence_is_recognised_by_its_peak(clip: Path) -> None:
    speech = decode(str(clip), max_seconds=MAX_SECONDS)
    assert not is_silent(speech)
    assert not is_silent(-np.abs(speech))
    assert not is_silent(speech * np.float32(0.01))
    assert is_silent(speech * np.float32(0.0005))
    assert is_silent(speech * 0)
    assert is_silent(speech[:0])


def test_preprocessing_lifts_quiet_speech_but_no_silence(
    clip: Path, ffmpeg: Ffmpeg, tmp_path: Path
) -> None:
    for decibels, peak in ((-38, (0.3, 1)), (-70, (0, 0.001))):
        quiet = ffmpeg("-i", clip, "-af", f"volume={decibels}dB", tmp_path / "quiet.wav")
        plain = decode(str(quiet), max_seconds=MAX_SECONDS)
        lifted = decode(str(quiet), max_seconds=MAX_SECONDS, preprocessing=True)
        assert len(lifted) == len(plain)
        assert np.abs(plain).max() < 0.02
        assert peak[0] <= np.abs(lifted).max() <= peak[1]


def test_preprocessing_helps_with_uneven_speech_and_does_no_harm(
    clip: Path, clip_text: str, quick: Engine, ffmpeg: Ffmpeg, wer: Wer, tmp_path: Path
) -> None:
    uneven = ffmpeg("-i", clip, "-af", "volume=-45dB:enable='lt(mod(t,8),4)'", tmp_path / "u.wav")

    def errors(source: Path, *, preprocessing: bool) -> float:
        samples = decode(str(source), max_seconds=MAX_SECONDS, preprocessing=preprocessing)
        return wer(clip_text, quick.transcribe(samples, TranscriptionOptions()).text)

    assert errors(clip, preprocessing=True) < 0.12
    assert errors(uneven, preprocessing=True) < errors(uneven, preprocessing=False) / 2


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/srv/uploads/a b.mp3", "'a b.mp3'"),
        ("relative.mp3", "'relative.mp3'"),
        ("https://host/bucket/user/talk%20one.mp3?token=secret", "'talk one.mp3'"),
        ("HTTPS://host", "'recording'"),
        ("a\n\x1b[31m.mp3", "'a[31m.mp3'"),
        ("x" * 300, f"'{'x' * 100}'"),
    ],
)
def test_display_name_is_the_base_name(source: str, name: str) -> None:
    assert display_name(source) == name
