"""API keys: made by the command line, used over REST, refused once they are no longer good."""

import logging
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from click.testing import CliRunner, Result
from starlette.testclient import TestClient

from jobs import keys
from jobs.cli import main
from jobs.database import make_pool
from jobs.errors import InvalidInput, KeyNotFound
from jobs.scopes import Scope
from jobs.settings import Settings
from web.app import create_app
from web.auth import issue_token

JOB_ID = UUID(int=7)

MakeUser = Callable[[], UUID]
Make = Callable[..., str]

ALL = frozenset(Scope)
KEY = re.compile(r"pgs_[0-9a-f]{8}_[0-9A-Za-z]{43}_[0-9a-f]{8}")


@pytest.fixture
def api(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def make(conn: psycopg.Connection) -> Make:
    def make_key(user_id: UUID | None, *scopes: Scope, **options: Any) -> str:
        return keys.create(conn, "test", user_id=user_id, scopes=scopes or ALL, **options)[1]

    return make_key


def bearer(key: str, stated: object = None) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {key}"}
    return headers if stated is None else headers | {"Pgscribe-User": str(stated)}


def submit(api: TestClient, headers: dict[str, str], user: UUID) -> Any:
    return api.post("/process", json={"filePath": f"{user}/a.mp3"}, headers=headers)


def assert_refused(response: Any, status: int, code: str, detail: str = "") -> None:
    assert (response.status_code, response.json()["code"]) == (status, code), response.text
    assert detail in response.json()["detail"]


def test_a_users_key_acts_for_that_user_under_row_level_security(
    api: TestClient, make: Make, make_user: MakeUser, settings: Settings
) -> None:
    user, other = make_user(), make_user()
    theirs = submit(api, bearer(make(other)), other).json()["jobId"]
    mine = submit(api, bearer(make(user)), user).json()["jobId"]
    headers = bearer(make(user))
    assert [job["id"] for job in api.get("/jobs", headers=headers).json()["jobs"]] == [mine]
    assert api.get(f"/jobs/{mine}", headers=headers).json()["user_id"] == str(user)
    assert_refused(api.get(f"/jobs/{theirs}", headers=headers), 404, "job_not_found")
    assert_refused(api.post(f"/jobs/{theirs}/cancel", headers=headers), 404, "job_not_found")
    assert_refused(submit(api, headers, other), 403, "not_allowed", "own folder")
    uploaded = api.put("/uploads/a.mp3", content=b"x", headers=headers).json()
    assert uploaded["filePath"].startswith(f"{user}/")
    token = {"Authorization": f"Bearer {issue_token(settings, user, lifetime=60)}"}
    assert api.get(f"/jobs/{mine}", headers=token).status_code == 200


def test_a_users_key_acts_for_nobody_else(api: TestClient, make: Make, make_user: MakeUser) -> None:
    user, other = make_user(), make_user()
    key = make(user)
    assert api.get("/jobs", headers=bearer(key, user)).status_code == 200
    for stated in (other, uuid4()):
        response = api.get("/jobs", headers=bearer(key, stated))
        assert_refused(response, 403, "not_allowed", "Pgscribe-User")


def test_a_services_key_acts_for_the_user_that_each_request_states(
    api: TestClient, make: Make, make_user: MakeUser
) -> None:
    user, other = make_user(), make_user()
    key = make(None)
    mine = submit(api, bearer(key, user), user).json()["jobId"]
    assert api.get(f"/jobs/{mine}", headers=bearer(key, user)).status_code == 200
    assert_refused(api.get(f"/jobs/{mine}", headers=bearer(key, other)), 404, "job_not_found")
    assert_refused(submit(api, bearer(key, other), user), 403, "not_allowed", "own folder")
    assert_refused(api.get("/jobs", headers=bearer(key)), 422, "invalid_input", "Pgscribe-User")
    assert api.get("/jobs", headers=bearer(key)).json()["field"] == "Pgscribe-User"
    for stated in ("me", "", "*", f"{user},{other}", "' or true"):
        response = api.get("/jobs", headers=bearer(key, stated))
        assert_refused(response, 422, "invalid_input", "Pgscribe-User")
    twice = [*bearer(key, user).items(), ("Pgscribe-User", str(other))]
    assert_refused(api.get("/jobs", headers=twice), 422, "invalid_input")
    for nobody in (uuid4(), UUID(int=0)):
        response = api.get("/jobs", headers=bearer(key, nobody))
        assert_refused(response, 403, "not_allowed", "no such user")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ("banned_until = now() + interval '1 day'", 403),
        ("banned_until = now() - interval '1 day'", 200),
        ("deleted_at = now()", 403),
    ],
)
def test_banned_users_are_not_acted_for(
    api: TestClient, make: Make, user: UUID, conn: psycopg.Connection, change: str, status: int
) -> None:
    conn.execute(f"update auth.users set {change} where id = %s".encode(), (user,))
    for headers in (bearer(make(user)), bearer(make(None), user)):
        assert api.get("/jobs", headers=headers).status_code == status


REQUESTS: list[tuple[Scope, str, str]] = [
    (Scope.JOBS_READ, "GET", "/jobs"),
    (Scope.JOBS_READ, "GET", f"/jobs/{JOB_ID}"),
    (Scope.JOBS_WRITE, "POST", "/process"),
    (Scope.JOBS_WRITE, "POST", f"/jobs/{JOB_ID}/cancel"),
    (Scope.JOBS_WRITE, "POST", f"/jobs/{JOB_ID}/retry"),
    (Scope.AUDIO_WRITE, "PUT", "/uploads/a.mp3"),
]


@pytest.mark.parametrize(("needed", "method", "path"), REQUESTS)
def test_scopes(
    api: TestClient, make: Make, user: UUID, needed: Scope, method: str, path: str
) -> None:
    for scope in Scope:
        response = api.request(method, path, headers=bearer(make(user, scope)))
        if scope is needed:
            assert response.status_code in {200, 404, 422}, response.text
        else:
            assert_refused(response, 403, "insufficient_scope", needed)
            challenge = f'Bearer error="insufficient_scope", scope="{needed}"'
            assert response.headers["www-authenticate"] == challenge


def test_keys_that_are_no_longer_good(
    api: TestClient, make: Make, user: UUID, conn: psycopg.Connection
) -> None:
    expired = make(user, lifetime=timedelta(0))
    kept = make(user, lifetime=timedelta(hours=1))
    stored, revoked = keys.create(conn, "lost", user_id=user, scopes=ALL)
    assert api.get("/jobs", headers=bearer(revoked)).status_code == 200
    keys.revoke(conn, stored.id)
    for key in (expired, revoked):
        response = api.get("/jobs", headers=bearer(key))
        assert_refused(response, 401, "not_authenticated", "API key is not valid")
        assert response.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert api.get("/jobs", headers=bearer(kept)).status_code == 200
    conn.execute("delete from auth.users where id = %s", (user,))
    assert_refused(api.get("/jobs", headers=bearer(kept)), 401, "not_authenticated")
    assert conn.execute("select count(*) from pgscribe.api_keys").fetchone() == (0,)


def test_only_whole_keys_are_looked_up(api: TestClient, make: Make, user: UUID) -> None:
    key = make(user)
    unknown = keys.generate(uuid4())
    changed = key[:20] + ("a" if key[20] != "a" else "b") + key[21:]
    for wrong in (
        unknown,
        changed,
        key[:-1],
        key + "0",
        key.upper(),
        "pgs_",
        key.replace("_", "-"),
    ):
        response = api.get("/jobs", headers=bearer(wrong))
        assert_refused(response, 401, "not_authenticated")
    assert not keys.well_formed(changed)
    assert keys.well_formed(unknown)
    assert api.get("/jobs", headers={"X-API-Key": key}).status_code == 401


def test_use_is_noted_once_a_minute(
    api: TestClient, make: Make, user: UUID, conn: psycopg.Connection
) -> None:
    def versions() -> tuple[Any, ...] | None:
        return conn.execute("select last_used_at, xmin::text from pgscribe.api_keys").fetchone()

    headers = bearer(make(user))
    assert conn.execute("select last_used_at from pgscribe.api_keys").fetchone() == (None,)
    api.get("/jobs", headers=headers)
    first = versions()
    assert first is not None
    assert first[0] is not None
    api.get("/jobs", headers=headers)
    assert versions() == first
    conn.execute("update pgscribe.api_keys set last_used_at = now() - interval '61 seconds'")
    api.get("/jobs", headers=headers)
    assert versions() != first
    recent = "select last_used_at > now() - interval '30 seconds' from pgscribe.api_keys"
    assert conn.execute(recent.encode()).fetchone() == (True,)


def test_a_key_that_others_note_the_use_of_is_not_waited_for(
    api: TestClient, make: Make, user: UUID, conn: psycopg.Connection
) -> None:
    key = make(user)
    with conn.transaction():
        conn.execute("select from pgscribe.api_keys for update")
        assert api.get("/jobs", headers=bearer(key)).status_code == 200


def test_keys_are_good_while_the_database_is_read_only(
    settings: Settings, make: Make, user: UUID, conn: psycopg.Connection
) -> None:
    name = conn.info.dbname
    conn.execute(f"alter database {name} set default_transaction_read_only = on".encode())
    with TestClient(create_app(settings)) as api:
        conn.execute("set default_transaction_read_only = off")
        key = make(user)
        assert api.get("/jobs", headers=bearer(key)).status_code == 200
    assert conn.execute("select last_used_at from pgscribe.api_keys").fetchone() == (None,)


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
def test_api_roles_do_not_see_keys(conn: psycopg.Connection, role: str) -> None:
    for statement in (
        "select * from pgscribe.api_keys",
        "select * from pgscribe.use_api_key('', null)",
    ):
        with conn.transaction(force_rollback=True):
            conn.execute("select set_config('role', %s, true)", (role,))
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement.encode())


def test_what_is_stored_is_not_the_key(make: Make, user: UUID, conn: psycopg.Connection) -> None:
    key = make(user)
    row = conn.execute(
        "select k::text, prefix, encode(hash, 'hex') from pgscribe.api_keys k"
    ).fetchone()
    assert row is not None
    text, prefix, digest = row
    assert key.startswith(prefix + "_")
    assert digest == keys.digest(key).hex()
    assert key.split("_")[2] not in text


def test_the_key_is_in_no_log_and_no_answer(
    api: TestClient,
    make: Make,
    user: UUID,
    conn: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    good, gone = make(user), make(user)
    keys.revoke(conn, keys.list_all(conn)[-1].id)
    answers = [api.get("/jobs", headers=bearer(key)) for key in (good, gone, good[:-1])]
    conn.execute("alter table pgscribe.api_keys rename to hidden")
    answers.append(api.get("/jobs", headers=bearer(good)))
    secrets = [part for key in (good, gone) for part in (key.split("_")[2], keys.digest(key).hex())]
    for secret in secrets:
        assert secret not in caplog.text
        assert not any(secret in answer.text for answer in answers)
    assert [answer.status_code for answer in answers] == [200, 401, 401, 500]
    assert "api_keys" in caplog.text, "what went wrong is logged"


@pytest.mark.anyio
async def test_a_key_that_is_unusable_tells_no_more_than_an_unknown_one(
    settings: Settings, make: Make, user: UUID
) -> None:
    revoked = make(user, lifetime=timedelta(0))
    async with make_pool(settings, name="test") as pool, pool.connection() as connection:
        for key in (revoked, keys.generate(uuid4())):
            assert await keys.use(connection, keys.digest(key), user) is None


@pytest.mark.parametrize(
    "options",
    [
        {"user_id": UUID(int=7)},
        {"name": ""},
        {"name": "x" * 101},
        {"name": "\0"},
        {"scopes": []},
        {"scopes": ["jobs:read", "everything"]},
        {"requests_per_minute": 0},
        {"lifetime": timedelta.max},
    ],
    ids=str,
)
def test_what_no_key_can_be(conn: psycopg.Connection, options: dict[str, Any]) -> None:
    values: dict[str, Any] = {"name": "a", "user_id": None, "scopes": ALL} | options
    with pytest.raises(InvalidInput):
        keys.create(conn, **values)
    assert keys.list_all(conn) == []


def test_no_such_key(conn: psycopg.Connection) -> None:
    with pytest.raises(KeyNotFound):
        keys.revoke(conn, uuid4())


# The command line ------------------------------------------------------------------------------


@pytest.fixture
def pgscribe(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", settings.database_url.get_secret_value())

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, ["keys", *map(str, arguments)])

    return run


def test_make_list_and_revoke(pgscribe: Callable[..., Result], api: TestClient, user: UUID) -> None:
    made = pgscribe("create", "import", "--user", user, "--scope", "jobs:read", "--expires", "12h")
    assert made.exit_code == 0, made.output
    key = made.stdout.strip()
    assert KEY.fullmatch(key)
    assert "expires" in made.stderr
    assert key not in made.stderr
    assert api.get("/jobs", headers=bearer(key)).status_code == 200
    assert submit(api, bearer(key), user).status_code == 403

    (line,) = pgscribe("list").stdout.splitlines()
    key_id = line.split()[0]
    for part in (key[:12], "usable", "used 2", str(user), "jobs:read", "import"):
        assert part in line
    assert key.split("_")[2] not in line

    assert pgscribe("revoke", key_id).exit_code == 0
    assert pgscribe("revoke", key_id).exit_code == 0
    assert api.get("/jobs", headers=bearer(key)).status_code == 401
    assert "revoked" in pgscribe("list").stdout
    unknown = pgscribe("revoke", uuid4())
    assert (unknown.exit_code, "no such API key" in unknown.output) == (1, True)


def test_a_services_key_has_all_scopes_and_no_end_unless_told(
    pgscribe: Callable[..., Result], api: TestClient, user: UUID
) -> None:
    made = pgscribe("create", "backend", "--any-user", "--requests-per-minute", "7")
    assert "no expiry" in made.stderr
    response = api.get("/jobs", headers=bearer(made.stdout.strip(), user))
    assert response.headers["ratelimit-policy"] == '"default";q=7;w=60'
    (line,) = pgscribe("list").stdout.splitlines()
    assert "any user" in line
    assert "audio:read,audio:write,jobs:read,jobs:write" in line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--any-user", "--user", "00000000-0000-4000-8000-000000000007"],
        ["--any-user", "--expires", "soon"],
        ["--any-user", "--expires", "0d"],
        ["--any-user", "--scope", "everything"],
        ["--user", "me"],
    ],
)
def test_unusable_arguments(
    pgscribe: Callable[..., Result], conn: psycopg.Connection, arguments: list[str]
) -> None:
    assert pgscribe("create", "a", *arguments).exit_code == 2
    assert keys.list_all(conn) == []


def test_an_unknown_user_is_one_plain_sentence(pgscribe: Callable[..., Result]) -> None:
    result = pgscribe("create", "a", "--user", uuid4())
    assert result.exit_code == 1
    assert "there is no user" in result.output
