"""`modal deploy` against the local Modal: what it checks, and what it would have deployed."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.local_modal.containers import REPO, clean_environment
from tests.local_modal.server import Address, in_thread
from tests.local_modal.settings import Settings

PATIENCE = 60.0


@pytest.fixture(scope="module")
def empty_server() -> Iterator[Address]:
    with in_thread(Settings()) as server:
        yield server


def modal(server: Address, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "modal", *arguments],
        cwd=REPO,
        env=clean_environment(**server.environment()),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def test_modal_deploy_works_offline(empty_server: Address) -> None:
    process = modal(empty_server, "deploy", "-m", "tests.local_modal.sample_app")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "App deployed" in process.stdout
    model = empty_server.control.definitions()["sample/Model.*"]
    assert model["resources"]["gpu_config"] == {"gpu_type": "L4", "count": 1}
    assert model["volume_mounts"][0]["mount_path"] == "/weights"
    assert model["autoscaler_settings"]["max_containers"] == 1
    assert [method["function_name"] for method in model["method_definitions"].values()] == [
        "Model.transcribe"
    ]
    assert any("numpy" in command for command in model["image"])


def test_deploying_again_keeps_the_ids(empty_server: Address) -> None:
    for _ in range(2):
        process = modal(empty_server, "deploy", "-m", "tests.local_modal.sample_app")
        assert process.returncode == 0, process.stdout + process.stderr
    assert "sample/double" in empty_server.control.definitions()


def test_a_wrong_token_cannot_deploy(empty_server: Address) -> None:
    wrong = Address(empty_server.url, empty_server.control_url, "ak-local", "as-wrong")
    process = modal(wrong, "deploy", "-m", "tests.local_modal.sample_app")
    assert process.returncode != 0
    assert "not valid" in process.stdout + process.stderr
