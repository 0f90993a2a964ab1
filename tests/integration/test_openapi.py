"""The API does what its description says, whatever is sent to it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
    unsupported_method,
)
from starlette.testclient import TestClient

from db.embedded import EmbeddedPostgres
from jobs.settings import Settings
from tests.conftest import TEMPLATE
from tests.live import serve
from web import openapi
from web.app import ENDPOINTS, TAGS, create_app
from web.auth import issue_token
from web.routes import resumable

DESCRIPTION = openapi.describe(ENDPOINTS, TAGS)
schemathesis.serializer.alias(resumable.BYTES, "application/octet-stream")
schema = schemathesis.openapi.from_dict(DESCRIPTION)


@pytest.fixture(scope="module")
def server(
    postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """A server's URL and a token of its user."""
    name = "openapi"
    folder: Path = tmp_path_factory.mktemp("openapi")
    postgres.create_database(name, template=TEMPLATE)
    user = uuid4()
    with psycopg.connect(postgres.url(database=name)) as conn:
        conn.execute("insert into auth.users (id) values (%s)", (user,))
    config = Settings.load(
        database_url=postgres.url(database=name),
        jwt_secret="a secret of thirty-two characters or more",
        storage_dir=folder / "storage",
        models_dir=folder / "models",
        scratch_dir=folder / "scratch",
        rate_limit=0,
        failed_rate_limit=0,
        openai_wait=1,  # nobody works on the jobs
    )
    with serve(create_app(config)) as url:
        yield url, issue_token(config, user, lifetime=3600)
    postgres.drop_database(name)


# Streams of events never end; tests/integration/test_events.py reads them.
@schema.exclude(path_regex="/events$").parametrize()
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_described(case: schemathesis.Case[Any], server: tuple[str, str]) -> None:
    url, token = server
    # A description can't say whose folder a path lies in, or that a date is over a year ahead.
    excluded: list[Any] = [positive_data_acceptance]
    response = case.call(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
    if response.status_code == 504:  # as nobody works on the jobs
        assert response.json()["error"]["code"] == "wait_timeout"
        excluded.append(not_a_server_error)
    if case.path.startswith("/uploads/"):  # PUT refuses names with slashes, such as other paths
        excluded.append(unsupported_method)
    if response.status_code in {412, 413}:  # which Schemathesis does not take for refusals
        excluded.append(negative_data_rejection)
    case.validate_response(response, excluded_checks=excluded)


def test_every_operation_says_what_it_does() -> None:
    for path, item in DESCRIPTION["paths"].items():
        for method, operation in item.items():
            assert operation["summary"], (method, path)
            assert operation["tags"], (method, path)
            assert "default" not in operation["responses"], (method, path)


def test_sessions_of_browsers_are_described_where_tokens_are() -> None:
    schemes = DESCRIPTION["components"]["securitySchemes"]
    cookies = {name: s["name"] for name, s in schemes.items() if s.get("in") == "cookie"}
    assert set(cookies.values()) == {"__Host-pgscribe", "pgscribe-session"}
    ways = [{name: list[str]()} for name in ("bearer", *cookies)]
    by_user = DESCRIPTION["paths"]["/jobs"]["get"], DESCRIPTION["paths"]["/process"]["post"]
    by_link = DESCRIPTION["paths"]["/audio/{token}"]["get"]
    assert [operation["security"] for operation in (*by_user, by_link)] == [ways, ways, []]


def test_the_description_is_served(settings: Settings) -> None:
    with TestClient(create_app(settings)) as api:
        assert api.get("/openapi.json").json() == DESCRIPTION


def test_the_page_loads_nothing_from_elsewhere(settings: Settings) -> None:
    with TestClient(create_app(settings)) as api:
        page = api.get("/docs")
        assert "https:" not in page.text
        assert "script-src 'self'" in page.headers["content-security-policy"]
        for path in ("swagger/swagger-ui.css", "swagger/swagger-ui-bundle.js", "page.js"):
            assert f'"docs/{path}"' in page.text
            assert api.get(f"/docs/{path}").status_code == 200
