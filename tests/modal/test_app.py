"""The app, deployed to a local Modal by the real client, its functions in containers there."""

import asyncio
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import modal
import pytest

from jobs.compute import packaged_weights
from jobs.compute.base import Prepare, Transcribe
from jobs.compute.modal import ModalCompute
from jobs.settings import Settings as WorkerSettings
from jobs.telemetry import Steps
from modal_functions import app as deployed
from modal_functions import engines
from modal_functions.config import Config, InvalidConfig
from modal_functions.engines import FASTER_WHISPER, OPENAI_WHISPER
from modal_functions.errors import InvalidOptions, NoSpeech
from modal_functions.merging import merge
from modal_functions.plan import Plan
from modal_functions.transcript import Transcript, TranscriptionOptions
from tests.local_modal.fixtures import local_modal, local_modal_server, modal_client
from tests.local_modal.server import Address
from tests.local_modal.settings import Settings
from tests.modal.conftest import Ffmpeg

__all__ = ["local_modal", "local_modal_server", "modal_client"]

pytestmark = pytest.mark.anyio

PATIENCE = 120.0
OPTIONS = {"model": "base", "language": "en"}


@pytest.fixture(scope="session")
def audio_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audio")


@pytest.fixture(scope="session")
def local_modal_settings(audio_dir: Path, models_dir: Path) -> Settings:
    weights = [
        packaged_weights.ensure(engine, "base", models_dir)
        for engine in (FASTER_WHISPER, OPENAI_WHISPER)
    ]
    if None in weights:
        pytest.skip("the packages with the weights of base are not installed")
    return Settings(
        apps=("modal_functions.app:app",),
        containers=1,
        container_environment={
            "PGSCRIBE_AUDIO_DIR": str(audio_dir),
            "PGSCRIBE_WEIGHTS_DIR": str(models_dir),
        },
    )


@pytest.fixture(scope="session")
def url(clip: Path, ffmpeg: Ffmpeg) -> Iterator[str]:
    """A server of the clip's folder, with a silent file in it."""
    ffmpeg("-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono", "-t", "3", clip.parent / "silent.wav")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(clip.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def prepare(client: modal.Client, source: str, **changes: Any) -> dict[str, Any]:
    function = modal.Function.from_name("audio-processing", "prepare_audio", client=client)
    arguments = {"key": "test", "preprocessing": False, "max_seconds": 60.0, **changes}
    call = await function.spawn.aio(source=source, **arguments)
    answer: dict[str, Any] = await call.get.aio(timeout=PATIENCE)
    assert answer["usage"]["cpu_seconds"] > 0
    return answer


async def transcribe(
    client: modal.Client, engine: str = FASTER_WHISPER, **arguments: Any
) -> dict[str, Any]:
    speech = modal.Cls.from_name("audio-processing", "SpeechModel", client=client)
    model = speech(engine=engine, model="base")
    call = await model.transcribe.spawn.aio(**{"options": OPTIONS, **arguments})
    answer: dict[str, Any] = await call.get.aio(timeout=PATIENCE)
    assert answer["usage"]["gpu_seconds"] >= 0
    return answer


def steps(answer: dict[str, Any]) -> list[str]:
    """Return what a call was busy with, once it is clear that it had the time for that."""
    report = Steps.from_answer(answer)
    assert report is not None
    during = [part for part in report.parts if part[0] != "load"]  # which may have been before
    assert sum(duration for _, _, duration in during) <= report.duration
    assert all(0 <= begin <= begin + took <= report.duration for _, begin, took in during)
    return [name for name, *_ in report.parts]


async def test_a_recording_is_prepared_and_transcribed(
    modal_client: modal.Client, url: str, clip_text: str, wer: Any, engine_name: str
) -> None:
    answer = await prepare(modal_client, f"{url}/clip.wav?token=signed")
    plan = Plan.from_dict(answer["plan"])
    assert len(plan.peaks) == 2000
    assert steps(answer) == ["decode", "plan", "save"]
    parts = []
    for span in plan.spans:
        times = {"start": span.start, "end": span.end}
        answer = await transcribe(modal_client, engine_name, pcm=str(plan.pcm), **times)
        assert {"read", "transcribe"} <= set(steps(answer)) <= {"load", "read", "transcribe"}
        parts.append((span.seconds, Transcript.from_dict(answer["transcript"])))
    assert wer(clip_text, merge(parts, name=plan.name).text) < 0.1


async def test_what_is_wrong_with_a_recording_is_returned(
    modal_client: modal.Client, url: str, audio_dir: Path
) -> None:
    missing = await prepare(modal_client, f"{url}/none.wav", key="missing")
    too_long = await prepare(modal_client, f"{url}/clip.wav", key="long", max_seconds=5.0)
    silent = await prepare(modal_client, f"{url}/silent.wav", key="silent")
    bad_key = await prepare(modal_client, f"{url}/clip.wav", key="../long")
    assert not any("plan" in answer for answer in (missing, too_long, silent, bad_key))
    assert too_long["error"]["code"] == "audio_too_long"
    assert silent["error"]["code"] == "no_speech"
    assert "'silent.wav' is silent" in silent["error"]["message"]
    assert bad_key["error"]["code"] == "invalid_options"
    assert not [
        path for key in ("missing", "long", "silent") for path in audio_dir.glob(f"*{key}*")
    ]
    assert not list(audio_dir.parent.glob("long*"))


async def test_audio_that_is_gone_and_a_bad_option_are_returned(
    modal_client: modal.Client,
) -> None:
    gone = await transcribe(modal_client, pcm="/audio/none.pcm", start=0, end=1)
    assert (gone["error"]["code"], gone["error"]["retryable"]) == ("prepared_audio_gone", True)
    bad = await transcribe(modal_client, pcm="x.pcm", start=0, end=1, options={"model": 1})
    assert bad["error"]["code"] == "invalid_options"


def test_what_is_deployed(local_modal: Address) -> None:
    definitions = local_modal.control.definitions()
    assert "audio-processing/update_job_status" not in definitions
    speech = definitions["audio-processing/SpeechModel.*"]
    assert speech["resources"]["gpu_config"]["gpu_type"] == "L4"
    assert {mount["mount_path"] for mount in speech["volume_mounts"]} == {"/audio", "/weights"}
    for name, definition in definitions.items():
        assert 1 <= definition["timeout_secs"] <= 24 * 3600
        assert definition.get("retry_policy", {}).get("retries", 0) <= 10
        assert "secret_ids" not in definition, name
        assert "nonpreemptible" not in definition.get("scheduler_placement", {})


@pytest.mark.filterwarnings("ignore:.*executing locally:UserWarning")
def test_functions_run_without_modal(
    engine_name: str,
    clip: Path,
    clip_text: str,
    wer: Any,
    models_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGSCRIBE_AUDIO_DIR", str(tmp_path))
    monkeypatch.setenv("PGSCRIBE_WEIGHTS_DIR", str(models_dir))
    plans = [
        deployed.prepare_audio.local(
            source=str(clip), key=key, preprocessing=False, max_seconds=60.0
        )["plan"]
        for key in ("here", "here", "here-too")
    ]
    assert [Path(plan["pcm"]).name.split(".")[0] for plan in plans] == ["here", "here", "here-too"]
    assert {str(path) for path in tmp_path.iterdir()} == {plan["pcm"] for plan in plans}
    model = deployed.SpeechModel(  # type: ignore[call-arg]  # its parameters
        engine=engine_name, model="base"
    )
    span = {"pcm": plans[0]["pcm"], "start": 0, "end": plans[0]["sample_count"]}
    first, second = (model.transcribe.local(**span, options=OPTIONS) for _ in range(2))
    assert wer(clip_text, first["transcript"]["text"]) < 0.1
    assert first["transcript"] == second["transcript"]
    assert first["transcript"]["engine"] == engine_name
    assert model.transcribe.local(**span, options={"model": "tiny"})["error"]["code"] == (
        "invalid_options"
    )
    deployed.discard_audio.local(plans[0]["pcm"])
    deployed.discard_audio.local(f"../{tmp_path.name}/.{Path(plans[1]['pcm']).name}")
    assert {str(path) for path in tmp_path.iterdir()} == {plan["pcm"] for plan in plans[1:]}


@pytest.mark.filterwarnings("ignore:.*executing locally:UserWarning")
def test_the_loading_of_a_model_is_counted_once(
    models_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGSCRIBE_AUDIO_DIR", str(tmp_path))
    monkeypatch.setenv("PGSCRIBE_WEIGHTS_DIR", str(models_dir))
    load = deployed._load  # noqa: SLF001 - its time is what this is about

    def slow(*arguments: str) -> Any:
        time.sleep(2)
        return load(*arguments)

    monkeypatch.setattr(deployed, "_load", slow)
    model = deployed.SpeechModel(  # type: ignore[call-arg]  # its parameters
        engine=FASTER_WHISPER, model="base"
    )
    first, second = (
        model.transcribe.local(pcm="none.pcm", start=0, end=1, options=OPTIONS)["usage"]
        for _ in range(2)
    )
    assert first["gpu_seconds"] > 2 > second["gpu_seconds"]


def test_windows_are_decoded_together_as_configured(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def load_engine(*_: object, batch_size: int, **__: object) -> None:
        asked.append(batch_size)

    monkeypatch.setenv("PGSCRIBE_WEIGHTS_DIR", str(models_dir))
    monkeypatch.setattr(engines, "load_engine", load_engine)
    deployed._load(FASTER_WHISPER, "base")  # noqa: SLF001 - what SpeechModel does
    assert asked == [deployed.config.batch_size] == [8]


@pytest.mark.filterwarnings("ignore:.*executing locally:UserWarning")
def test_one_file_is_transcribed_as_a_whole(
    clip: Path, clip_text: str, wer: Any, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGSCRIBE_WEIGHTS_DIR", str(models_dir))
    answer = deployed.transcribe_audio.local(str(clip), {"language": "en"})
    assert answer.keys() == {"text", "segments", "language"}
    assert wer(clip_text, answer["text"]) < 0.1
    assert answer["segments"][0]["start"] < 2
    with pytest.raises(InvalidOptions, match=r"options\.language"):
        deployed.transcribe_audio.local(str(clip), {"language": "English"})


async def test_one_file_is_transcribed_by_one_call(
    modal_client: modal.Client, url: str, clip_text: str, wer: Any
) -> None:
    function = modal.Function.from_name("audio-processing", "transcribe_audio", client=modal_client)
    call = await function.spawn.aio(f"{url}/clip.wav?token=signed", {"language": "en"})
    answer = await call.get.aio(timeout=PATIENCE)
    assert wer(clip_text, answer["text"]) < 0.1
    call = await function.spawn.aio(f"{url}/silent.wav")
    with pytest.raises(NoSpeech, match=r"'silent\.wav' is silent"):
        await call.get.aio(timeout=PATIENCE)


def test_one_file_is_transcribed_from_the_command_line(
    local_modal: Address, url: str, clip_text: str, wer: Any
) -> None:
    options = json.dumps({"language": "en"})
    command = [sys.executable, "-m", "modal", "run", "-m", "modal_functions.app::transcribe"]
    command += ["--file-path", f"{url}/clip.wav", "--options", options]
    done = subprocess.run(
        command,
        env=os.environ | local_modal.environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout[done.stdout.index("\n{\n") : done.stdout.rindex("\n}") + 2]
    assert wer(clip_text, json.loads(printed)["text"]) < 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("APP_NAME", "two words"),
        ("GPU", "L5"),
        ("GPU", "H100:8"),
        ("SPAN_TIMEOUT", "86401"),
        ("SPAN_TIMEOUT", "60"),
        ("FILE_TIMEOUT", "3600"),
        ("RETRIES", "11"),
        ("SCALEDOWN_WINDOW", "1"),
        ("MAX_CONTAINERS", "many"),
        ("MAX_SPAN", "40"),
        ("NONPREEMPTIBLE", "1"),
        ("SUPABASE_SECRET", "two words"),
    ],
)
def test_unusable_settings_are_named(name: str, value: str) -> None:
    with pytest.raises(InvalidConfig, match=f"PGSCRIBE_MODAL_{name}: "):
        Config.load({f"PGSCRIBE_MODAL_{name}": value})


def test_a_container_has_the_configuration_of_the_deployment() -> None:
    config = Config.load({"PGSCRIBE_MODAL_GPU": "L4,A10", "PGSCRIBE_MODAL_SUPABASE_SECRET": "one"})
    assert Config.load(config.environment()) == config
    assert config.gpus == ["L4", "A10"]


async def test_a_workers_calls_run_whisper(
    local_modal: Address,  # noqa: ARG001 - its environment
    url: str,
    models_dir: Path,
    wer: Any,
    clip_text: str,
) -> None:
    """The worker's own client, the deployed app, real audio and a real model."""
    settings = WorkerSettings.load(database_url="postgresql://nowhere", models_dir=models_dir)
    async with ModalCompute(settings) as compute:

        async def outcome(request: Prepare | Transcribe) -> dict[str, Any]:
            async with asyncio.timeout(PATIENCE):
                return (await compute.result(await compute.spawn(request), lambda _: None)).value

        request = Prepare(
            f"{url}/clip.wav?signature=1",
            "worker",
            preprocessing=False,
            max_seconds=60,
            min_span=4,
            max_span=10,
        )
        plan = Plan.from_dict(await outcome(request))
        assert len(plan.spans) >= 2
        options = TranscriptionOptions(language="en")
        parts = []
        for span in plan.spans:
            value = await outcome(Transcribe(str(plan.pcm), span, options))
            parts.append((span.seconds, Transcript.from_dict(value)))
        await compute.discard(str(plan.pcm))
    assert wer(clip_text, merge(parts, name=plan.name).text) < 0.1
