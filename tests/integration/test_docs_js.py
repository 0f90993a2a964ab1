"""The JavaScript of the documentation: the real supabase-js, on a real database.

Behind it PostgREST, Auth and Storage as far as tests/postgrest.py and its like go. docs_js.mjs
speaks Realtime's protocol; what subscribers are sent is in tests/integration/test_realtime.py.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests import postgrest
from tests.doc_blocks import REPO, runs
from tests.integration.test_docs_sql import make_job
from tests.supabase_auth import server as auth_server
from tests.supabase_storage import server as storage_server

BLOCKS = runs("js")
NODE = shutil.which("node")
TOOLS = REPO / ".pgscribe" / "tools"
SCRIPT = REPO / "tests" / "integration" / "docs_js.mjs"
EMAIL, PASSWORD = "anna@example.org", "correct horse"
PATIENCE = 60  # seconds

pytestmark = pytest.mark.skipif(
    NODE is None or not (TOOLS / "node_modules" / "@supabase" / "supabase-js").is_dir(),
    reason="needs node, and npm's @supabase/supabase-js and ws in .pgscribe/tools",
)


@pytest.fixture
def services(database: str, user: UUID) -> Iterator[dict[str, Any]]:
    """Where a project's services are, and the tokens that they take."""
    storage_state = storage_server.StandIn()
    with (
        postgrest.serve() as rest,
        auth_server.serving() as auth,
        storage_server.serving(storage_state) as storage,
    ):
        rest.database = database
        auth.add(user, EMAIL, PASSWORD)
        storage.buckets["audio"] = storage_server.Bucket()
        yield {
            "rest": {
                "base": rest.url,
                "keys": {
                    "apikey": rest.publishable_key,
                    "user": rest.user_token(user),
                    "admin": rest.service_role_key,
                },
            },
            "auth": {"base": auth.url, "keys": {"apikey": auth.key}},
            "storage": {"base": storage.url, "keys": {"user": storage.user_token(user)}},
        }


# What has to be found: a method that is none, a function and a column that are none.
WRONG = (
    "await supabase.form('processing_jobs').select()",
    "await supabase.rpc('cancel_processing_jobs', { id: user.id })",
    "await supabase.from('processing_jobs').select('state')",
)


def test_javascript_in_the_documentation(
    conn: psycopg.Connection, user: UUID, services: dict[str, Any]
) -> None:
    conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user,))
    asked = list[dict[str, Any]]()
    for block in BLOCKS:
        status = block.options.get("job")
        given = {"id": make_job(conn, user, status)} if status else {}
        asked += [{"code": block.code, "given": given, "waits": "waits" in block.how}] * (
            2 if "again" in block.options else 1
        )
    asked += [{"code": code, "given": {}, "waits": False} for code in WRONG]
    told = run(services, asked)
    results = iter(told["results"])
    for block in BLOCKS:
        result = next(results)
        assert problems(result) == [], (block.name, result)
        if again := block.options.get("again"):
            result = next(results)
            assert problems(result) == [again], (block.name, result)
        if "waits" not in block.how:
            check(block.options, result["answers"][-1]["body"], block.name)
    assert [bool(problems(result)) for result in results] == [True] * len(WRONG)
    (change,) = told["joined"]
    names = ", ".join(change["select"])
    assert change["filter"] == f"user_id=eq.{user}"
    conn.execute(f"select {names} from {change['schema']}.{change['table']}".encode())


def run(services: dict[str, Any], blocks: list[dict[str, Any]]) -> dict[str, Any]:
    who = {"user": EMAIL, "password": PASSWORD}
    done = subprocess.run(
        [str(NODE), str(SCRIPT)],
        input=json.dumps({"tools": str(TOOLS), "services": services, "blocks": blocks} | who),
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert len(told["results"]) == len(blocks)
    return told


def problems(result: dict[str, Any]) -> list[str]:
    """Return what was thrown, and the status of what was refused."""
    thrown = [result["error"]] if "error" in result else []
    statuses = [answer["status"] for answer in result["answers"]]
    return thrown + [str(status) for status in statuses if status >= 300]


def check(how: dict[str, str], body: Any, name: str) -> None:
    """Compare what was answered last with what the comment says."""
    rows = body if isinstance(body, list) else [body] if body else []
    if "rows" in how:
        assert len(rows) == int(how["rows"]), (name, rows)
    for column, value in how.items():
        if column not in {"job", "rows", "again"}:
            assert str(rows[0][column]) == value, (name, rows)
