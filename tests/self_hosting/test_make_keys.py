"""`pgscribe make-keys`: what it makes is good for what it is for, and what is there stays."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from click.testing import CliRunner, Result
from dotenv import dotenv_values

from jobs.cli import main
from jobs.self_hosting import MADE_FROM, SECRETS
from tests.conftest import REPO

EXAMPLE = (REPO / ".env.example").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env.example").write_text(EXAMPLE, encoding="utf-8")
    return tmp_path


def make_keys(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["make-keys", *arguments])


def values(folder: Path) -> dict[str, str]:
    return {name: value or "" for name, value in dotenv_values(folder / ".env").items()}


def made(folder: Path) -> dict[str, str]:
    done = make_keys()
    assert done.exit_code == 0, done.output
    return values(folder)


def test_all_secrets_are_made_and_none_is_shown(folder: Path) -> None:
    done = make_keys()
    assert done.exit_code == 0, done.output
    env = values(folder)
    assert all(len(env[name]) >= 16 for name in SECRETS)
    # Random ones are no less than 128 bits, and none is made twice.
    assert len({env[name] for name in SECRETS}) == len(SECRETS)
    assert not any(env[name] in done.output for name in SECRETS)
    assert stat.S_IMODE((folder / ".env").stat().st_mode) == 0o600
    assert {path.name for path in folder.iterdir()} == {".env", ".env.example"}
    # Everything else is as the template has it, comments and all.
    assert [line for line in (folder / ".env").read_text().splitlines() if line[:1] == "#"] == [
        line for line in EXAMPLE.splitlines() if line[:1] == "#"
    ]
    assert env["SUPABASE_PUBLIC_URL"] == "http://supabase.localhost:8000"


def test_a_second_run_changes_nothing(folder: Path) -> None:
    make_keys()
    before = (folder / ".env").read_bytes()
    done = make_keys()
    assert done.exit_code == 1
    assert "--missing" in done.output
    assert (folder / ".env").read_bytes() == before


def test_tokens_of_the_roles(folder: Path) -> None:
    env = made(folder)
    public = jwt.PyJWKSet.from_json(env["JWT_JWKS"])
    shared = next(key for key in public.keys if key.algorithm_name == "HS256")
    for name, role in (("ANON_KEY", "anon"), ("SERVICE_ROLE_KEY", "service_role")):
        # By the secret, as Auth and Storage do, and by the key set, as PostgREST does.
        for key in (env["JWT_SECRET"], shared):
            claims = jwt.decode(env[name], key, algorithms=["HS256"])
            assert (claims["role"], claims["iss"]) == (role, "supabase")
        assert claims["exp"] > time.time() + 9 * 365 * 24 * 3600


def test_auth_signs_and_the_others_can_only_check(folder: Path) -> None:
    env = made(folder)
    keys: list[dict[str, Any]] = json.loads(env["JWT_KEYS"])
    (private,) = [key for key in keys if "sign" in key.get("key_ops", ())]
    token = jwt.encode({"sub": "1"}, jwt.PyJWK(private), headers={"kid": private["kid"]})
    assert jwt.get_unverified_header(token)["alg"] == "ES256"
    public = jwt.PyJWKSet.from_json(env["JWT_JWKS"])
    assert jwt.decode(token, public[private["kid"]], algorithms=["ES256"]) == {"sub": "1"}
    (check,) = [key for key in json.loads(env["JWT_JWKS"])["keys"] if key["kty"] == "EC"]
    assert "d" not in check
    assert check["key_ops"] == ["verify"]
    assert {check["x"], check["y"]} == {private["x"], private["y"]}


def test_what_is_missing_is_added_and_the_rest_stays(folder: Path) -> None:
    env = made(folder)
    text = (folder / ".env").read_text()
    text = text.replace(f"ANON_KEY={env['ANON_KEY']}\n", "ANON_KEY=\n")
    text = text.replace("DISABLE_SIGNUP=true\n", "").replace("JWT_EXPIRY=3600", "JWT_EXPIRY=600")
    text = "".join(
        line for line in text.splitlines(keepends=True) if not line.startswith("JWT_JWKS=")
    )
    (folder / ".env").write_text(text + "MINE=1\n")
    done = make_keys("--missing")
    assert done.exit_code == 0, done.output
    now = values(folder)
    assert {name for name in env if now[name] != env[name]} <= {"JWT_EXPIRY", "ANON_KEY"}
    assert (now["JWT_EXPIRY"], now["DISABLE_SIGNUP"], now["MINE"]) == ("600", "true", "1")
    assert jwt.decode(now["ANON_KEY"], now["JWT_SECRET"], algorithms=["HS256"])["role"] == "anon"
    assert now["JWT_JWKS"] == env["JWT_JWKS"]
    before = (folder / ".env").read_bytes()
    assert make_keys("--missing").exit_code == 0
    assert (folder / ".env").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "renewed"),
    [("SUPABASE_SECRET_KEY", set()), ("JWT_SECRET", set(MADE_FROM["JWT_SECRET"]))],
)
def test_a_secret_is_renewed_with_what_is_made_from_it(
    folder: Path, name: str, renewed: set[str]
) -> None:
    env = made(folder)
    done = make_keys("--renew", name)
    assert done.exit_code == 0, done.output
    now = values(folder)
    assert {other for other in env if now[other] != env[other]} == {name, *renewed}
    assert jwt.decode(now["ANON_KEY"], now["JWT_SECRET"], algorithms=["HS256"])["role"] == "anon"
    assert stat.S_IMODE((folder / ".env").stat().st_mode) == 0o600


def test_what_is_no_secret_or_not_there_is_refused(folder: Path) -> None:
    assert ".env.example" in make_keys("--missing").output
    make_keys()
    before = (folder / ".env").read_bytes()
    refused = make_keys("--renew", "SUPABASE_PUBLIC_URL")
    assert refused.exit_code == 1
    assert "is no secret" in refused.output
    assert make_keys("--renew", "JWT_KEYS", "--missing").exit_code == 2
    assert (folder / ".env").read_bytes() == before
    (folder / ".env").unlink()
    (folder / ".env.example").unlink()
    absent = make_keys()
    assert absent.exit_code == 1
    assert ".env.example" in absent.output
    assert not (folder / ".env").exists()


def test_what_would_not_fit_together_is_refused(folder: Path) -> None:
    env = made(folder)
    text = (folder / ".env").read_text()
    for lost, left in (("JWT_SECRET", "ANON_KEY"), ("JWT_KEYS", "JWT_JWKS")):
        lines = [line for line in text.splitlines() if not line.startswith(f"{lost}=")]
        (folder / ".env").write_text("\n".join([*lines, f"{lost}=", ""]))
        before = (folder / ".env").read_bytes()
        refused = make_keys("--missing")
        assert refused.exit_code == 1
        assert lost in refused.output
        assert left in refused.output
        assert (folder / ".env").read_bytes() == before
    spoiled = text.replace(f"JWT_JWKS='{env['JWT_JWKS']}'", "JWT_JWKS=")
    (folder / ".env").write_text(spoiled.replace(f"JWT_KEYS='{env['JWT_KEYS']}'", "JWT_KEYS=none"))
    refused = make_keys("--missing")
    assert refused.exit_code == 1
    assert "Error: JWT_KEYS is no list" in refused.output


def test_an_env_of_any_kind_stays_what_it_is(folder: Path) -> None:
    env = made(folder)
    (folder / "elsewhere").mkdir()
    real = (folder / ".env").rename(folder / "elsewhere" / "secrets")
    (folder / ".env").symlink_to(real)
    text = real.read_text().replace("SMTP_SENDER_NAME=pgscribe", "SMTP_SENDER_NAME=Café")
    real.write_text(f"{text}POSTGRES_PASSWORD=\n", encoding="utf-8")
    command = [sys.executable, "-X", "utf8=0", "-m", "jobs.cli", "make-keys", "--missing"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / ".env").is_symlink()
    assert "SMTP_SENDER_NAME=Café\n" in real.read_text(encoding="utf-8")
    # The one that the database was made with is still there.
    assert f"POSTGRES_PASSWORD={env['POSTGRES_PASSWORD']}\n" in real.read_text(encoding="utf-8")


def test_git_takes_no_file_with_secrets() -> None:
    """Not even a draft that a killed `make-keys` has left."""
    names = [".env", ".env.0123abcd.new", ".env.old", "pgscribe.env", ".env.example"]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", *names],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == names[:-1]


def test_several_at_once_undo_nothing(folder: Path) -> None:
    env = made(folder)
    renewed = [name for name in SECRETS if "PASSWORD" in name or "REALTIME" in name]
    command = [sys.executable, "-m", "jobs.cli", "make-keys", "--renew"]
    started = [
        subprocess.Popen([*command, name], cwd=folder, env=os.environ | {"PYTHONPATH": str(REPO)})
        for name in renewed
    ]
    assert [process.wait(60) for process in started] == [0] * len(renewed)
    now = values(folder)
    assert {name for name in env if now[name] != env[name]} == set(renewed)
