"""What the documentation has and no test can run whole: that it is there, and reads as it should.

Commands that install, deploy, or run for ever; settings; files of other programs.
"""

import ast
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import dropwhile
from pathlib import Path

import click
import pytest
import yaml
from dotenv import dotenv_values
from modal.cli.entry_point import entrypoint_cli

from jobs import health
from jobs.cli import main
from jobs.settings import Settings
from tests.command_lines import commands, filled, parse
from tests.doc_blocks import REPO, Block, checks
from tests.self_hosting.test_compose import compose

SHELL = checks("shell")
MODULES = checks("module")
ENVIRONMENTS = checks("env")
PROMETHEUS = checks("prometheus")
PROBES = checks("probes")
PROXIES = checks("proxy")
OVERRIDES = checks("override")

SHELLCHECK = Path(sys.executable).with_name("shellcheck")
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
COMPOSE = yaml.safe_load((REPO / "docker-compose.yml").read_text(encoding="utf-8"))


# Commands ----------------------------------------------------------------------------------------


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    for extras in re.findall(r"pgscribe\[(.+)\]", " ".join(arguments)):
        known = PYPROJECT["project"]["optional-dependencies"]
        assert set(extras.split(",")) <= set(known), extras


def check_make(arguments: list[str]) -> None:
    text = (REPO / "Makefile").read_text(encoding="utf-8")
    targets = {
        name.replace("$(BIN)", ".venv/bin") for name in re.findall(r"(?m)^([^\s:#]+):", text)
    }
    asked = {word for word in arguments if "=" not in word}
    assert asked <= targets, asked - targets


def check_docker(arguments: list[str]) -> None:
    stages = set(re.findall(r"(?m)^FROM .* AS (\w+)$", (REPO / "Dockerfile").read_text("utf-8")))
    match arguments:
        case ["compose", command, *rest]:
            service, *inside = [*dropwhile(lambda word: word.startswith("-"), rest), ""]
            if command in {"exec", "restart", "up"} and service:
                assert service in COMPOSE["services"], service
            if command == "exec":
                check(inside[:-1])
        case ["build", *rest]:
            assert Path(REPO, rest[-1], "Dockerfile").is_file()
            assert "--target" not in rest or rest[rest.index("--target") + 1] in stages
        case ["run", *rest] if "pgscribe" in rest:  # the image, whose entry point is the command
            parse(main, "pgscribe", rest[rest.index("pgscribe") + 1 :])
        case ["run", *_]:
            pass
        case _:
            pytest.fail(f"docker {arguments}: no test knows this")


def check_python(arguments: list[str]) -> None:
    flag, module, *rest = arguments
    assert flag == "-m"
    found = importlib.util.find_spec(module)
    if found is not None and found.submodule_search_locations is not None:
        found = importlib.util.find_spec(f"{module}.__main__")
    assert found is not None, f"there is no module {module}"
    assert found.origin is not None
    options = {word.partition("=")[0] for word in rest if word.startswith("-")}
    assert options <= known_options(Path(found.origin)), f"{module} has no such option"


def known_options(file: Path) -> set[str]:
    """Return what a module reads from its command line: the options that its text declares."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {"--help"} | {
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {"add_argument", "option"}
        for argument in call.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    }


# Of other programs nothing but the grammar is checked here; tests/faults/test_backup.py runs
# psql and pg_dump.
ONLY_READ = {"cd", "eval", "export", "ffmpeg", "flite", "git", "openssl", "pg_dump", "psql"}
PROGRAMS: Mapping[str, Callable[[list[str]], None]] = {
    "pgscribe": lambda arguments: parse(main, "pgscribe", arguments),
    "modal": lambda arguments: parse(entrypoint_cli, "modal", arguments),
    "pip": check_pip,
    "make": check_make,
    "docker": check_docker,
    "python": check_python,
}


def check(words: list[str]) -> None:
    """Check a command as far as its program is known here."""
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program not in ONLY_READ:
        assert program in PROGRAMS, f"no test knows the program {program}"
        PROGRAMS[program](arguments)


@pytest.mark.parametrize("block", SHELL + MODULES, ids=str)
def test_commands_are_there_with_their_options(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO / "examples" if block.document.startswith("examples") else REPO)
    for words in commands(block.code):
        try:
            check(words)
        except click.UsageError as exc:
            pytest.fail(f"{block.name}: {' '.join(words)}: {exc.format_message()}")


def test_scripts_are_the_shells() -> None:
    script = "\n".join(f"# {block.name}\n(\n{filled(block.code)})" for block in SHELL + MODULES)
    # Files that are not there are none of its business, nor variables that the reader has set.
    done = subprocess.run(
        [SHELLCHECK, "--shell=bash", "--exclude=SC1091,SC2030,SC2031,SC2103,SC2164", "-"],
        input=script, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_docker_compose_has_the_options(block: Block) -> None:
    used = [words[2:] for words in commands(block.code) if words[:2] == ["docker", "compose"]]
    for command, *rest in used:
        told = subprocess.run(
            [*compose().split(), command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for word in own_options(rest):
            assert re.search(rf"(?<![\w-]){word}\b", told), f"docker compose {command} {word}"


def own_options(words: Iterable[str]) -> Iterator[str]:
    """Yield the options before the first argument; what follows may be another program's."""
    for word in words:
        if not word.startswith("-"):
            return
        yield word


@pytest.mark.parametrize(
    "command",
    [
        "pgscribe wrker", "pgscribe worker --concurency 2", "pip install 'pgscribe[locl]'",
        "make tset", "modal app stpo x", "docker compose restart gatway", "docker swarm init",
        "docker build -t x --target lcoal .", "python -m examples.see_trace",
        "python -m benchmarks.queue --round 1", "frobnicate",
        "docker compose exec web pgscribe dokter",
    ],
)  # fmt: skip
def test_what_is_not_there_is_found(command: str) -> None:
    (words,) = commands(command)
    with pytest.raises((AssertionError, click.UsageError, pytest.fail.Exception)):
        check(words)


# Settings and files ------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ENVIRONMENTS, ids=str)
def test_settings_are_there_and_take_the_values(block: Block) -> None:
    values = dotenv_values(stream=io.StringIO(filled(block.code)))
    assert values
    named = {name.removeprefix("PGSCRIBE_").lower(): value for name, value in values.items()}
    ours = {name: value for name, value in named.items() if name in Settings.model_fields}
    Settings.load(**({"database_url": "postgresql://nowhere"} | ours), _env_file=None)
    example = dotenv_values(REPO / ".env.example")
    left = {name for name in values if name.removeprefix("PGSCRIBE_").lower() not in ours}
    assert left <= set(example) | {"OTEL_EXPORTER_OTLP_ENDPOINT"}, left


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool of Debian's package prometheus is missing")
    for block in PROMETHEUS:
        (tmp_path / "key").touch()
        file = tmp_path / "prometheus.yml"
        file.write_text(block.code.replace("/etc/prometheus/pgscribe.key", str(tmp_path / "key")))
        done = subprocess.run(
            ["promtool", "check", "config", str(file)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_probes_ask_what_workers_answer() -> None:
    source = Path(health.__file__).read_text(encoding="utf-8")
    for block in PROBES:
        probes = yaml.safe_load(block.code)
        assert set(probes) == {"livenessProbe", "readinessProbe"}
        for probe in probes.values():
            assert f'"{probe["httpGet"]["path"]}"' in source
            assert probe["timeoutSeconds"] > 1


def test_proxies_lead_to_published_ports() -> None:
    published = {
        str(port).rsplit(":", 2)[-2]
        for service in COMPOSE["services"].values()
        for port in service.get("ports", [])
    }
    for block in PROXIES:
        assert block.code.count("{") == block.code.count("}")
        asked = set(re.findall(r"127\.0\.0\.1:(\d+)", block.code))
        assert asked
        assert asked <= published, published


def test_compose_takes_the_override(tmp_path: Path) -> None:
    for block in OVERRIDES:
        file = tmp_path / "override.yml"
        file.write_text(block.code)
        done = subprocess.run(
            [*compose().split(), "--env-file", "/dev/null", "-f", str(file), "config", "--quiet"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
