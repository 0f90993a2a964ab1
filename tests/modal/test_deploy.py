"""`pgscribe deploy` in processes of its own, against a local Modal."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobs import deploy
from jobs.cli import main
from jobs.compute.base import Prepare
from jobs.compute.modal import CONNECT_TIMEOUT, ModalCompute
from jobs.errors import DeploymentFailed, SettingsError
from jobs.settings import CallSettings
from jobs.settings import Settings as WorkerSettings
from modal_functions import config as modal_config
from modal_functions.config import Config
from modal_functions.fingerprint import fingerprint
from tests.local_modal.containers import REPO, clean_environment
from tests.local_modal.server import Address, in_thread
from tests.local_modal.settings import Settings

SECRET = "as-of-nobody-else"
SCRIPT = REPO / "scripts" / "deploy-modal.sh"
ALL = "prepare_audio, discard_audio, transcribe_audio, describe, SpeechModel.transcribe"
PATIENCE = 60.0  # seconds, of which a deployment here takes one

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def server() -> Iterator[Address]:
    with in_thread(Settings(token_secret=SECRET)) as address:
        yield address


@pytest.fixture
def cloud(server: Address) -> Iterator[Address]:
    yield server
    server.control.reset()


def environment(server: Address, **variables: str) -> dict[str, str]:
    ours = {name: value for name, value in clean_environment().items() if "PGSCRIBE_" not in name}
    return ours | server.environment() | variables


@pytest.fixture
def run(cloud: Address, tmp_path: Path) -> Run:
    """Run `pgscribe deploy` in a folder without settings; no output may hold the token's secret."""

    def run_(*arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "deploy", *arguments],
            cwd=tmp_path,
            env=environment(cloud, **variables),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert SECRET not in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done

    return run_


def app_named(name: str) -> dict[str, str]:
    """A test deploys an app of its own."""
    return {"PGSCRIBE_MODAL_APP_NAME": name}


@pytest.mark.anyio
async def test_what_is_deployed_is_what_a_worker_calls(
    run: Run, cloud: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await asyncio.to_thread(run, "--check", **app_named("talks"))
    assert (before.returncode, before.stdout.count("\n")) == (1, 2)
    assert "no app talks; run `pgscribe deploy`" in before.stderr

    done = await asyncio.to_thread(run, **app_named("talks"))
    assert done.returncode == 0, done.stderr
    steps = ["settings ", "token ", "App deployed", "deployed ", "found ", "verified ", "Done; "]
    places = [done.stdout.index(step) for step in steps]
    assert places == sorted(places)
    assert f"found      {ALL}\n" in done.stdout
    assert "workspace local" in done.stdout
    assert fingerprint() in done.stdout

    after = await asyncio.to_thread(run, "--check", **app_named("talks"))
    assert (after.returncode, after.stdout.splitlines()[-1]) == (0, "Up to date")
    assert "App deployed" not in after.stdout

    for name, value in (cloud.environment() | app_named("talks")).items():
        monkeypatch.setenv(name, value)
    settings = WorkerSettings.load(database_url="postgresql://nowhere")
    async with ModalCompute(settings) as compute:
        cloud.control.pause()
        await compute.spawn(Prepare("none", "key", preprocessing=False, max_seconds=60))
        await compute.discard("/audio/key.pcm")
    calls = [call["function"] for call in await asyncio.to_thread(cloud.control.calls)]
    assert calls[-2:] == ["prepare_audio", "discard_audio"]


def test_the_doctor_says_so_as_well(
    run: Run, cloud: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {
        "PGSCRIBE_DATABASE_URL": "postgresql://nowhere",
        "PGSCRIBE_JWT_SECRET": "0123456789abcdef0123456789abcdef",
        "PGSCRIBE_COMPUTE": "modal",
        "PGSCRIBE_PUBLIC_URL": "https://api.example.org",
    } | app_named("doctor")

    def modal(**variables: str) -> tuple[int, str]:
        """Return the exit status of `pgscribe doctor` and what it says of Modal."""
        variables = settings | cloud.environment() | variables
        done = CliRunner().invoke(main, ["doctor", "--only", "modal"], env=variables)
        assert SECRET not in done.output
        assert "Traceback" not in done.output
        return done.exit_code, done.stdout.split("modal", 1)[1]

    status, said = modal()
    assert (status, "no app doctor; run `pgscribe deploy`" in said) == (1, True)
    status, said = modal(MODAL_TOKEN_SECRET="as-of-somebody")
    assert (status, "refuses the token" in said, "modal token new" in said) == (1, True, True)
    status, said = modal(MODAL_TOKEN_ID="", MODAL_TOKEN_SECRET="")
    assert (status, "MODAL_TOKEN_ID" in said) == (1, True)
    assert run(**app_named("doctor")).returncode == 0
    status, said = modal()
    assert (status, f"code {fingerprint()}" in said) == (0, True)


def test_a_check_names_what_has_changed_and_a_deployment_changes_it(run: Run) -> None:
    name = app_named("changes")
    assert run(**name).returncode == 0
    changed = run("--check", PGSCRIBE_MODAL_GPU="H100", PGSCRIBE_MODAL_RETRIES="1", **name)
    assert changed.returncode == 1
    assert "  PGSCRIBE_MODAL_GPU: L4 there, H100 here\n" in changed.stderr
    assert "  PGSCRIBE_MODAL_RETRIES: 2 there, 1 here\n" in changed.stderr
    assert "PGSCRIBE_MODAL_CPU" not in changed.stderr
    assert run(PGSCRIBE_MODAL_GPU="H100", **name).returncode == 0
    assert run("--check", PGSCRIBE_MODAL_GPU="H100", **name).returncode == 0
    assert "H100 there, L4 here" in run("--check", **name).stderr


def test_a_check_sees_that_other_code_is_deployed(run: Run, tmp_path: Path) -> None:
    name = app_named("code")
    assert run(**name).returncode == 0
    for package in ("jobs", "modal_functions"):
        shutil.copytree(REPO / package, tmp_path / package)
    with (tmp_path / "modal_functions" / "splitting.py").open("a") as module:
        module.write("# A later version.\n")
    newer = run("--check", PYTHONPATH=str(tmp_path), **name)
    assert newer.returncode == 1
    assert f"code: {fingerprint()} there, " in newer.stderr
    assert "PGSCRIBE_MODAL" not in newer.stderr


def test_an_app_that_lacks_something_is_older(run: Run, cloud: Address) -> None:
    code = "from tests.faults.speech_app import app; app.deploy(name='older')"
    subprocess.run(
        [sys.executable, "-c", code], env=environment(cloud), check=True, timeout=PATIENCE
    )
    older = run("--check", **app_named("older"))
    assert older.returncode == 1
    assert "is older than this pgscribe" in older.stderr
    assert "it has no transcribe_audio, describe. Run `pgscribe deploy`" in older.stderr


def test_what_a_secret_switches_on_is_looked_up_as_well(run: Run) -> None:
    name = app_named("reports")
    secret = {"PGSCRIBE_MODAL_SUPABASE_SECRET": "supabase"}
    assert run(**name).returncode == 0
    assert "it has no update_job_status. Run" in run("--check", **name, **secret).stderr
    done = run(**name, **secret)
    assert done.returncode == 0, done.stderr
    assert "update_job_status" in done.stdout


def test_an_environment_of_modals(run: Run, cloud: Address) -> None:
    name = app_named("elsewhere")
    done = run("--environment", "staging", **name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("PGSCRIBE_COMPUTE=modal and MODAL_ENVIRONMENT=staging\n")
    assert "staging:elsewhere/describe" in cloud.control.definitions()
    assert run("--check", MODAL_ENVIRONMENT="staging", **name).returncode == 0
    assert "no app elsewhere" in run("--check", **name).stderr


def test_settings_of_dotenv_are_deployed_and_the_environment_wins(
    run: Run, cloud: Address, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        "PGSCRIBE_MODAL_APP_NAME=dotenv\n"
        "PGSCRIBE_MODAL_GPU=H100\n"
        "PGSCRIBE_MODAL_RETRIES=5\n"
        "OTHER=1\n"
    )
    done = run(PGSCRIBE_MODAL_RETRIES="1")
    assert done.returncode == 0, done.stderr
    speech = cloud.control.definitions()["dotenv/SpeechModel.*"]
    assert speech["resources"]["gpu_config"]["gpu_type"] == "H100"
    assert speech["retry_policy"]["retries"] == 1
    assert any("PGSCRIBE_MODAL_GPU=H100" in line for line in speech["image"])


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"PGSCRIBE_MODAL_GPU": "L5"}, "PGSCRIBE_MODAL_GPU: 'L5' is no kind of GPU"),
        ({"PGSCRIBE_MODAL_GPUS": "L4"}, "PGSCRIBE_MODAL_GPUS: is unknown"),
        ({"PGSCRIBE_CALL_TIMEOUT": "soon"}, "PGSCRIBE_CALL_TIMEOUT: "),
        ({"PGSCRIBE_CALL_TIMEOUT": "60"}, "PGSCRIBE_CALL_TIMEOUT: must be at least 90, not 60"),
        ({"PGSCRIBE_MAX_AUDIO_SECONDS": "40000"}, "MODAL_PREPARE_TIMEOUT: must be at least 4000"),
    ],
)
def test_unusable_settings_end_it_before_modal_is_asked(
    run: Run, cloud: Address, variables: dict[str, str], named: str
) -> None:
    done = run(**variables)
    assert (done.returncode, done.stdout) == (1, "")
    assert named in done.stderr
    assert cloud.control.requests() == {}


@pytest.mark.parametrize(
    ("variables", "notes"),
    [
        ({}, []),
        ({"PGSCRIBE_CALL_TIMEOUT": "3599"}, ["PGSCRIBE_MODAL_PREPARE_TIMEOUT allow 3600 s"]),
        (
            {"PGSCRIBE_CALL_TIMEOUT": "1500"},
            ["PREPARE_TIMEOUT allow", "PGSCRIBE_MODAL_SPAN_TIMEOUT allow 1800 s"],
        ),
        ({"PGSCRIBE_MODAL_MAX_AUDIO_SECONDS": "60"}, ["60 s are all that transcribe_audio takes"]),
    ],
)
def test_workers_that_would_expect_something_else_are_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], notes: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, found = deploy.settings()
    assert len(found) == len(notes)
    assert all(note in text for note, text in zip(notes, found, strict=True))


def test_without_a_token_it_says_where_to_get_one(run: Run) -> None:
    done = run(MODAL_TOKEN_ID="", MODAL_TOKEN_SECRET="")
    assert done.returncode == 1
    assert "modal token new" in done.stderr
    assert "MODAL_TOKEN_ID, MODAL_TOKEN_SECRET: needed" in done.stderr


def test_a_token_may_come_from_modals_own_file(run: Run, cloud: Address, tmp_path: Path) -> None:
    file = tmp_path / "modal.toml"
    file.write_text(f'[default]\ntoken_id = "{cloud.token_id}"\ntoken_secret = "{SECRET}"\n')
    code = "import os, sys; from jobs.cli import main; main(['deploy', '--check'])"
    variables = environment(cloud, MODAL_CONFIG_PATH=str(file), **app_named("none"))
    variables = {name: value for name, value in variables.items() if "MODAL_TOKEN" not in name}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=variables, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "token      accepted" in done.stdout
    file.write_text("[default\n")
    broken = run("--check", MODAL_CONFIG_PATH=str(file))
    assert broken.returncode == 1
    assert "Modal's configuration is not usable" in broken.stderr


def test_a_token_that_is_refused(run: Run) -> None:
    done = run(MODAL_TOKEN_SECRET="as-wrong-and-secret")
    assert (done.returncode, done.stdout.count("\n")) == (1, 1)
    assert "Modal refuses the token" in done.stderr
    assert "as-wrong-and-secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("how", ["closed port", "black hole"])
def test_a_server_that_is_out_of_reach_is_waited_for_no_longer_than_said(
    run: Run, how: str
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if how == "black hole":
            listener.listen()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        began = time.monotonic()
        done = run(MODAL_SERVER_URL=url)
        seconds = time.monotonic() - began
    assert done.returncode == 1
    assert f"Modal does not answer at {url}" in done.stderr
    assert seconds < CONNECT_TIMEOUT + 15, "the client itself takes 56 s"


@pytest.mark.parametrize(
    ("rpc", "status", "said"),
    [
        ("AppPublish", "PERMISSION_DENIED", "Modal refuses the deployment: injected"),
        ("AppCreate", "UNAVAILABLE", "Modal does not answer at http"),
        ("ClassGet", "UNAVAILABLE", "Modal does not answer at http"),
        ("FunctionMap", "RESOURCE_EXHAUSTED", "Modal does not answer at http"),
        ("FunctionGetOutputs", "NOT_FOUND", "A container of the app refused failed"),
    ],
)
def test_what_modal_refuses_is_one_sentence(
    run: Run, cloud: Address, rpc: str, status: str, said: str
) -> None:
    cloud.control.fail(rpc, status, times=50)
    done = run(**app_named("refused"))
    assert done.returncode == 1
    assert said in done.stderr
    assert "Done" not in done.stdout


def test_an_image_that_cannot_be_built(run: Run, cloud: Address) -> None:
    cloud.control.fail_builds("No matching distribution found for torch==99\nand more")
    done = run(**app_named("unbuilt"))
    assert done.returncode == 1
    assert "Modal could not build an image; its log is above" in done.stderr
    assert "No matching distribution found for torch==99 and more)." in done.stderr
    cloud.control.heal()
    assert "no app unbuilt" in run("--check", **app_named("unbuilt")).stderr


@pytest.mark.parametrize("status", ["INIT_FAILURE", "FAILURE", "TIMEOUT", "INTERNAL_FAILURE"])
def test_a_container_that_does_not_start(run: Run, cloud: Address, status: str) -> None:
    cloud.control.end_next("describe", status, exception="no ffmpeg in here")
    done = run(**app_named("stillborn"))
    assert done.returncode == 1
    assert "deployed   stillborn" in done.stdout
    assert "A container of the app stillborn failed; `modal app logs stillborn`" in done.stderr


@pytest.mark.anyio
async def test_a_container_that_never_answers(
    run: Run, cloud: Address, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert (await asyncio.to_thread(run, **app_named("silent"))).returncode == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deploy, "START_TIMEOUT", 0.5)
    for name, value in (cloud.environment() | app_named("silent")).items():
        monkeypatch.setenv(name, value)
    cloud.control.pause()
    with pytest.raises(DeploymentFailed, match=r"No container of the app silent has answered"):
        await deploy.run(lambda _: None, check=True)


def test_ctrl_c_ends_it_at_once_and_says_what_to_do(cloud: Address, tmp_path: Path) -> None:
    cloud.control.delay("ImageGetOrCreate", PATIENCE)
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "deploy"],
        cwd=tmp_path,
        env=environment(cloud, **app_named("stopped")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        cloud.control.wait_for_requests("ImageGetOrCreate", 1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "Stopped; `pgscribe deploy --check` says what is deployed.\n"


def test_the_script_finds_pgscribe(cloud: Address, tmp_path: Path) -> None:
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    variables = environment(cloud, PATH=f"{bin_}:/usr/bin:/bin", **app_named("script"))

    def script(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [copy, *arguments],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    copy = tmp_path / "checkout" / "scripts" / SCRIPT.name  # beside no .venv
    copy.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, copy)
    assert os.access(SCRIPT, os.X_OK)
    missing = script()
    assert missing.returncode == 127
    assert "pip install" in missing.stderr

    program = bin_ / "pgscribe"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m jobs.cli "$@"\n')
    program.chmod(0o755)
    assert script("--check").returncode == 1
    done = script()
    assert (done.returncode, "Done; " in done.stdout) == (0, True), done.stderr
    assert script("--check").returncode == 0

    own = tmp_path / "checkout" / ".venv" / "bin" / "pgscribe"
    own.parent.mkdir(parents=True)
    own.write_text('#!/bin/sh\necho "the checkout\'s: $@"\n')
    own.chmod(0o755)
    assert script("--check").stdout == "the checkout's: deploy --check\n"


def test_the_fingerprint_is_of_names_and_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_copy() -> str:
        monkeypatch.setattr("modal_functions.fingerprint.__file__", str(package / "x.py"))
        return fingerprint()

    package = tmp_path / "package"
    shutil.copytree(REPO / "modal_functions", package)
    ours = fingerprint()
    assert of_copy() == ours
    (package / "notes.txt").write_text("not uploaded")
    assert of_copy() == ours
    (package / "merging.py").rename(package / "joining.py")
    assert of_copy() != ours


def test_the_documentation_has_every_variable() -> None:
    lines = (REPO / "docs" / "modal.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `PGSCRIBE_MODAL")]
    documented = {row[0].strip("`"): (row[1], row[2]) for row in rows}
    expected = {}
    for variable, default in Config().environment().items():
        name = variable.removeprefix(modal_config.PREFIX).lower()
        limits = modal_config.RANGES.get(name)
        allowed = f"{limits[0]:g} to {limits[1]:.0f}" if limits else documented[variable][1]
        expected[variable] = (f"`{default}`", allowed)
    assert documented == expected


def test_settings_are_checked_as_the_workers_read_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PGSCRIBE_DATABASE_URL", raising=False)
    assert CallSettings.load().modal_gpu == Config().gpu
    monkeypatch.setenv("PGSCRIBE_MODAL_GPU", "none such")
    with pytest.raises(SettingsError, match="PGSCRIBE_MODAL_GPU"):
        deploy.settings()
