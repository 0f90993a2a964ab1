"""update_job_status, deployed with a secret to a local Modal and run in a container there.

The local Modal's secrets are empty: the project's URL and key are the container's environment.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import modal
import psycopg
import pytest

from modal_functions.status import InvalidReport, ReportRefused
from tests import postgrest
from tests.local_modal.fixtures import local_modal, modal_client
from tests.local_modal.server import Address, in_thread
from tests.local_modal.settings import Settings
from tests.postgrest import LocalSupabase

__all__ = ["local_modal", "modal_client"]

pytestmark = pytest.mark.anyio

REPO = Path(__file__).parents[2]
SECRET = "supabase-reports"
NAME = "audio-processing/update_job_status"
LOCAL = """
import sys
from modal_functions import app
print(app.update_job_status.local(sys.argv[1], "processing", {"progress": 0.5})["progress"])
"""


@pytest.fixture(scope="module")
def supabase_project() -> Iterator[LocalSupabase]:
    with postgrest.serve() as project:
        yield project


@pytest.fixture(scope="module")
def environment(supabase_project: LocalSupabase) -> dict[str, str]:
    return {
        "PGSCRIBE_MODAL_SUPABASE_SECRET": SECRET,
        "SUPABASE_URL": supabase_project.url,
        "SUPABASE_SECRET_KEY": supabase_project.secret_key,
    }


@pytest.fixture(scope="module")
def local_modal_server(environment: dict[str, str]) -> Iterator[Address]:
    settings = Settings(
        apps=("modal_functions.app:app",), containers=1, container_environment=environment
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGSCRIBE_MODAL_SUPABASE_SECRET", SECRET)  # for `modal deploy`
        with in_thread(settings) as server:
            patch.undo()
            yield server


@pytest.fixture
def job(
    supabase_project: LocalSupabase, database: str, conn: psycopg.Connection, user: UUID
) -> UUID:
    """A job that is processing, in the database that the project serves."""
    supabase_project.database = database
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
        (user, f"{user}/a.mp3"),
    ).fetchone()
    assert row is not None
    conn.execute("update procrastinate.procrastinate_jobs set status = 'doing'")
    job_id: UUID = row[0]
    return job_id


async def report(client: modal.Client, *arguments: Any) -> dict[str, Any]:
    function = modal.Function.from_name("audio-processing", "update_job_status", client=client)
    answer: dict[str, Any] = await function.remote.aio(*arguments)
    return answer


async def test_a_report_from_modal_is_on_the_row(
    modal_client: modal.Client, job: UUID, conn: psycopg.Connection
) -> None:
    answer = await report(
        modal_client, str(job), "processing", {"progress": 0.5, "note": "half of it"}
    )
    assert (answer["id"], answer["status"]) == (str(job), "processing")
    assert (answer["progress"], answer["note"]) == (0.5, "half of it")
    row = conn.execute("select progress, note from processing_jobs").fetchone()
    assert row == (0.5, "half of it")


async def test_errors_come_back_as_themselves(
    modal_client: modal.Client, job: UUID, conn: psycopg.Connection, environment: dict[str, str]
) -> None:
    with pytest.raises(InvalidReport, match=r"^status: must be 'processing'"):
        await report(modal_client, str(job), "completed", {"progress": 1})
    with pytest.raises(ReportRefused, match=r"^id: there is no such job") as caught:
        await report(modal_client, str(uuid4()), "processing", {"progress": 1})
    assert caught.value.code == "23514"
    assert environment["SUPABASE_SECRET_KEY"] not in repr(vars(caught.value)) + str(caught.value)
    row = conn.execute("select status, progress, note from processing_jobs").fetchone()
    assert row == ("processing", 0.0, None)


def test_it_alone_has_the_secret(local_modal: Address) -> None:
    definitions = local_modal.control.definitions()
    with_secret = {
        name: each["secret_ids"] for name, each in definitions.items() if "secret_ids" in each
    }
    assert with_secret == {NAME: [f"st-{SECRET}"]}
    own = definitions[NAME]
    assert not own["resources"].get("gpu_config", {}).get("gpu_type")
    assert "volume_mounts" not in own
    assert "supabase==2.34.1" in str(own["image"])
    assert all("supabase==" not in str(d["image"]) for n, d in definitions.items() if n != NAME)


def test_it_runs_without_modal(
    job: UUID, conn: psycopg.Connection, environment: dict[str, str]
) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOCAL, str(job)],
        cwd=REPO,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout == "0.5\n"
    assert conn.execute("select progress from processing_jobs").fetchone() == (0.5,)
