"""Real recordings, real ffmpeg, real weights: what the tests of transcription share."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jiwer
import pytest

from jobs.compute import packaged_weights
from modal_functions.audio import SAMPLE_RATE, Samples, decode
from modal_functions.engines import FASTER_WHISPER, OPENAI_WHISPER, Engine, load_engine

REPO = Path(__file__).parent.parent.parent

LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")

THIRD_PARTY_WARNINGS = (
    # openai-whisper opens its vocabulary and leaves closing it to the garbage collector.
    "ignore:unclosed file.*tiktoken:ResourceWarning",
    # It is what one of the tests asks for.
    "ignore:Word-level timestamps on translations may not be reliable:UserWarning",
)

Ffmpeg = Callable[..., Path]
Wer = Callable[[str, str], float]
Load = Callable[[str, str], Engine]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in THIRD_PARTY_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session")
def models_dir() -> Path:
    return Path(os.environ.get("PGSCRIBE_TEST_MODELS_DIR") or REPO / ".pgscribe" / "models")


@pytest.fixture(scope="session")
def load(models_dir: Path) -> Load:
    """Load an engine with packaged weights, once."""
    loaded: dict[tuple[str, str], Engine] = {}

    def _load(engine: str, model: str) -> Engine:
        if (engine, model) not in loaded:
            path = packaged_weights.ensure(engine, model, models_dir)
            if path is None:
                pytest.skip(f"the packages with the weights of {model} are not installed")
            loaded[engine, model] = load_engine(engine, model, path=path, device="cpu", threads=2)
        return loaded[engine, model]

    return _load


@pytest.fixture(params=[FASTER_WHISPER, OPENAI_WHISPER])
def engine_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def base(load: Load, engine_name: str) -> Engine:
    return load(engine_name, "base")


@pytest.fixture
def tiny_en(load: Load, engine_name: str) -> Engine:
    return load(engine_name, "tiny.en")


@pytest.fixture
def quick(load: Load) -> Engine:
    """The fastest engine with the fastest model, where any will do."""
    return load(FASTER_WHISPER, "tiny.en")


@pytest.fixture(scope="session")
def ffmpeg() -> Ffmpeg:
    """Run ffmpeg with the given arguments; the last one is the output, which is returned."""
    executable = shutil.which("ffmpeg")
    if executable is None:
        import imageio_ffmpeg

        executable = str(imageio_ffmpeg.get_ffmpeg_exe())

    def run(*arguments: object) -> Path:
        command = [executable, "-nostdin", "-v", "error", "-y", *map(str, arguments)]
        subprocess.run(command, check=True)
        return Path(str(arguments[-1]))

    return run


@pytest.fixture(scope="session")
def sample() -> Path:
    return REPO / "examples" / "sample.mp3"


@pytest.fixture(scope="session")
def sample_text() -> str:
    return (REPO / "examples" / "sample.txt").read_text()


@pytest.fixture(scope="session")
def clip(sample: Path, ffmpeg: Ffmpeg, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first paragraph of the sample, 17 s, as wav."""
    return ffmpeg("-i", sample, "-t", 17, tmp_path_factory.mktemp("clip") / "clip.wav")


@pytest.fixture(scope="session")
def clip_text(sample_text: str) -> str:
    return sample_text.split("\n\n", maxsplit=1)[0]


@pytest.fixture(scope="session")
def sentence(clip: Path) -> Samples:
    """Return the samples of the sample's first sentence, 6 s."""
    return decode(str(clip), max_seconds=60)[: int(6.2 * SAMPLE_RATE)]


@pytest.fixture(scope="session")
def wer() -> Wer:
    """Return the share of wrong words, whatever the case and punctuation."""

    def normalise(text: str) -> str:
        return " ".join(re.findall(r"[\w']+", text.lower().replace("mr.", "mister")))

    def rate(reference: str, hypothesis: str) -> float:
        return float(jiwer.wer(normalise(reference), normalise(hypothesis)))

    return rate


@pytest.fixture(scope="session")
def librivox(ffmpeg: Ffmpeg, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return 25 s of a human reader, and what she reads."""
    if not LIBRIVOX.is_dir():
        pytest.skip("Debian's pocketsphinx-testdata, which has human speech, is not installed")
    folder = tmp_path_factory.mktemp("librivox")
    recordings = sorted(LIBRIVOX.glob("*.wav"))
    (folder / "list").write_text("".join(f"file '{path}'\n" for path in recordings))
    text = re.sub(r"</?s>|\(.*\)", "", (LIBRIVOX / "transcription").read_text())
    return ffmpeg("-f", "concat", "-safe", 0, "-i", folder / "list", folder / "all.wav"), text
