"""What Prometheus reads of a real web server and a real worker, and what is made of it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from uuid import UUID, uuid4

import httpx2
import psycopg
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.requests import Request

from db import migrate
from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs import keys
from jobs.metrics import MAX_CODES, _Codes
from jobs.scopes import Scope
from jobs.settings import Settings
from jobs.sql import CALLS
from tests import ports
from tests.conftest import REPO, TEMPLATE, cut_off
from tests.faults.fleet import until
from tests.live import serve
from tests.receiver import Answer, receiving
from web.app import create_app
from web.routes import metrics

MONITORING = REPO / "deploy" / "monitoring"
PASSWORD = "the password of dev's sign-in"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
OWNER_NAME = "anna.secret"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool of Debian's package prometheus is missing"
)


def promtool(*arguments: str, said: str | None = None) -> None:
    done = subprocess.run(
        ["promtool", *arguments],
        input=said,
        text=True,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout


def read(url: str, headers: dict[str, str] | None = None, accept: str = "") -> httpx2.Response:
    return httpx2.get(f"{url}/metrics", headers={"Accept": accept} | (headers or {}), timeout=20)


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    """Return a sample's value; one that is not there is 0, as it is for Prometheus' rates."""
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


@dataclass
class Site:
    """A web server and a worker that have done something."""

    web: str
    worker: str
    operator: dict[str, str]
    owner: UUID
    conn: psycopg.Connection
    settings: Settings
    receiver_port: int
    worker_process: subprocess.Popen[bytes]

    def text_of(self, part: str, accept: str = "") -> str:
        answer = read(self.web, self.operator, accept) if part == "web" else read(self.worker)
        if part == "worker" and accept:
            answer = read(self.worker, accept=accept)
        assert answer.status_code == HTTPStatus.OK, answer.text
        return answer.text

    def families(self) -> dict[str, Metric]:
        return {
            family.name: family
            for part in ("web", "worker")
            for family in parse_text(self.text_of(part))
        }


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@contextmanager
def running_worker(
    settings: Settings, folder: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a worker process, and yield where its health is, and the process."""
    environment = {
        "PGSCRIBE_DATABASE_URL": settings.database_url.get_secret_value(),
        "PGSCRIBE_STORAGE_DIR": str(settings.storage_dir),
        "PGSCRIBE_MODELS_DIR": str(settings.models_dir),
        "PGSCRIBE_SCRATCH_DIR": str(folder / "scratch"),
        "PGSCRIBE_ENGINE_PROCESSES": "1",
        "PGSCRIBE_WEBHOOK_NETWORKS": "127.0.0.0/8",
    }
    with ports.reserved() as port, (folder / "worker.log").open("ab") as log:
        command = [sys.executable, "-m", "jobs.cli", "worker", "--health-port", str(port)]
        process = subprocess.Popen(
            [*command, "--stop-with-stdin"],
            env=os.environ | environment,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        with process:
            url = f"http://127.0.0.1:{port}"

            def hears() -> bool:
                with contextlib.suppress(httpx2.ConnectError):
                    return bool(httpx2.get(f"{url}/readyz").json()["wakeups"] == "notify")
                return False

            until(hears, "the worker hears of jobs")
            yield url, process


@pytest.fixture(scope="module")
def site(
    postgres: EmbeddedPostgres,
    tmp_path_factory: pytest.TempPathFactory,
    clip: Path,
    models_dir: Path,
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("metrics")
    postgres.create_database("metrics", template=TEMPLATE)
    url = postgres.url(database="metrics")
    settings = Settings.load(
        database_url=url,
        jwt_secret="a secret of thirty-two characters or more",
        storage_dir=folder / "storage",
        models_dir=models_dir,
        local_sign_in_password=PASSWORD,
    )
    owner, operator = uuid4(), uuid4()
    (settings.storage_dir / str(owner)).mkdir(parents=True)
    shutil.copy(clip, settings.storage_dir / str(owner) / "private-talk.wav")
    with (
        receiving() as receiver,
        psycopg.connect(url, autocommit=True) as conn,
        serve(create_app(settings)) as web,
        running_worker(settings, folder) as (worker, process),
    ):
        for user, name in ((owner, OWNER_NAME), (operator, "operator")):
            values = (user, f"{name}@example.org")
            conn.execute("insert into auth.users (id, email) values (%s, %s)", values)
        conn.execute("insert into pgscribe.operators (user_id) values (%s)", (operator,))
        _, secret = keys.create(conn, "test", user_id=operator, scopes=(Scope.OPERATE,))
        receiver.answers = [Answer(500)]
        for name in ("private-talk.wav", "missing.mp3"):
            conn.execute(
                "insert into processing_jobs (user_id, file_path, webhook_url) values (%s, %s, %s)",
                (owner, f"{owner}/{name}", receiver.url),
            )
        ended = "select from processing_jobs where completed_at is not null"
        until(lambda: conn.execute(ended).rowcount == 2, "both jobs have ended")
        receiver.expect(2)
        site = Site(web, worker, bearer(secret), owner, conn, settings, receiver.port, process)
        use(site)
        until(
            lambda: value(samples(site.text_of("worker")), "pgscribe_light_attempts_total",
                          queue="webhooks", outcome="succeeded"),
            "the worker has counted its webhooks",
        )  # fmt: skip
        yield site
    postgres.drop_database("metrics")


def use(site: Site) -> None:
    """Do with the web server what there are metrics of."""
    httpx2.get(f"{site.web}/jobs/{uuid4()}", headers=site.operator)
    httpx2.get(f"{site.web}/{OWNER_NAME}/{uuid4()}")
    httpx2.get(f"{site.web}/jobs", headers=bearer("x.y.z"))
    httpx2.request("BREW", f"{site.web}/jobs")
    for password in ("wrong", PASSWORD):
        form = {"email": f"{OWNER_NAME}@example.org", "password": password}
        same = {"Sec-Fetch-Site": "same-origin"}
        httpx2.post(f"{site.web}/app/sign-in", data=form, headers=same)


def test_what_a_worker_has_counted(site: Site) -> None:
    found = samples(site.text_of("worker"))
    assert value(found, "pgscribe_job_pickup_seconds_count") == 2
    assert value(found, "pgscribe_job_pickup_seconds_bucket", le="60.0") == 2
    ended = "pgscribe_attempts_total"
    assert value(found, ended, outcome="succeeded", error_code="none") == 1
    assert value(found, ended, outcome="failed", error_code="file_not_found") == 1
    assert value(found, "pgscribe_attempt_seconds_count", outcome="succeeded") == 1
    assert value(found, "pgscribe_audio_seconds_total") == pytest.approx(6, abs=0.1)
    assert value(found, "pgscribe_real_time_factor_count") == 1
    assert 0.1 < value(found, "pgscribe_real_time_factor_sum") < 500
    chunks = value(found, "pgscribe_chunks_total")
    assert chunks >= 1
    for kind, count in (("prepare", 1), ("transcribe", chunks)):
        assert value(found, "pgscribe_calls_started_total", kind=kind) == count
        assert value(found, "pgscribe_calls_total", kind=kind, outcome="returned") == count
        assert value(found, "pgscribe_call_seconds_count", kind=kind) == count
    row = site.conn.execute(
        "select (usage ->> 'cpu_seconds')::float8, (usage ->> 'gpu_seconds')::float8,"
        " (usage ->> 'estimated_cost')::float8"
        " from processing_jobs where status = 'completed'"
    ).fetchone()
    assert row is not None
    assert value(found, "pgscribe_cpu_seconds_total") == pytest.approx(row[0], abs=0.01)
    assert value(found, "pgscribe_gpu_seconds_total", gpu="local") == pytest.approx(row[1], abs=0.1)
    cost = value(found, "pgscribe_estimated_cost_dollars_total", gpu="local")
    assert cost == pytest.approx(row[2], abs=1e-4)
    sent = "pgscribe_webhook_requests_total"
    assert value(found, sent, outcome="failed", status="5xx") == 1
    assert value(found, sent, outcome="delivered", status="2xx") in {1, 2}, "or again by now"
    assert value(found, "pgscribe_webhook_request_seconds_count", status="2xx") in {1, 2}
    assert value(found, "pgscribe_worker_notifications_total", kind="transcription") >= 1
    assert value(found, "pgscribe_worker_turn_seconds_count") >= 2
    assert value(found, "pgscribe_worker_connections_total") == 1
    assert value(found, "pgscribe_worker_ready") == 1
    assert value(found, "pgscribe_worker_slots", kind="light") == site.settings.worker_light_slots
    assert value(found, "process_resident_memory_bytes") > 1e6


def test_what_a_web_server_has_counted_and_the_database_tells(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FRESH", 0.0)
    read(site.web, site.operator)
    found = samples(site.text_of("web"))
    requests = "pgscribe_http_requests_total"
    assert value(found, requests, method="GET", route="/jobs/{job_id}", status="4xx") == 1
    assert value(found, requests, method="GET", route="none", status="4xx") == 1
    assert value(found, requests, method="other", route="/jobs", status="4xx") == 1
    assert value(found, requests, method="GET", route="/metrics", status="2xx") >= 1
    timed = "pgscribe_http_request_seconds_count"
    assert value(found, timed, method="GET", route="/jobs/{job_id}") == 1
    assert value(found, "pgscribe_http_unauthenticated_total") == 1
    assert value(found, "pgscribe_sign_ins_total", outcome="refused") == 1
    assert value(found, "pgscribe_sign_ins_total", outcome="succeeded") == 1
    assert value(found, "pgscribe_pool_connections", state="in_use") == 0, "it was given back"
    assert value(found, "pgscribe_pool_max_connections") == site.settings.database_pool_size
    assert value(found, "pgscribe_database_up") == 1
    assert value(found, "pgscribe_workers", state="alive") == 1
    assert value(found, "pgscribe_jobs_ended_10m", status="completed") == 1
    assert value(found, "pgscribe_jobs_failed_10m", error_code="file_not_found") == 1
    assert value(found, "pgscribe_webhooks_ended_10m", status="delivered") in {1, 2}


def test_jobs_are_counted_by_state_and_class_of_their_owners(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "FRESH", 0.0)
    limited, paused = uuid4(), uuid4()
    with site.conn.transaction(force_rollback=False):
        for user in (limited, paused):
            site.conn.execute("insert into auth.users (id) values (%s)", (user,))
        site.conn.execute("select pause_queue('transcription')")
        site.conn.execute("select limit_owner(%s, weight => 2::real)", (limited,))
        site.conn.execute("select pause_owner(%s)", (paused,))
        for user, count in ((site.owner, 1), (limited, 2), (paused, 3)):
            site.conn.execute(
                "insert into processing_jobs (user_id, file_path, scheduled_at) select %s, 'a/b',"
                " case when n = 0 then now() + interval '1 hour' end from generate_series(0, %s) n",
                (user, count),
            )
    found = samples(site.text_of("web"))
    assert value(found, "pgscribe_queue_paused") == 1
    for owners, count in (("default", 1), ("own", 2), ("paused", 3)):
        assert value(found, "pgscribe_jobs", state="queued", owners=owners) == count
        assert value(found, "pgscribe_jobs", state="scheduled", owners=owners) == 1
        assert value(found, "pgscribe_jobs", state="processing", owners=owners) == 0
        oldest = value(found, "pgscribe_jobs_oldest_seconds", state="queued", owners=owners)
        assert 0 < oldest < 60
    monkeypatch.setattr(metrics, "FRESH", 60.0)
    site.conn.execute("delete from processing_jobs where completed_at is null")
    assert (
        samples(site.text_of("web"))["pgscribe_jobs", (("owners", "own"), ("state", "queued"))] == 2
    ), "figures of a moment ago, at no cost"
    monkeypatch.setattr(metrics, "FRESH", 0.0)
    found = samples(site.text_of("web"))
    assert value(found, "pgscribe_jobs", state="queued", owners="own") == 0
    site.conn.execute("select resume_queue('transcription')")


def test_a_worker_that_is_stopped_answers_nobody(site: Site) -> None:
    assert httpx2.get(f"{site.worker}/healthz").json() == {"status": "ok"}
    site.worker_process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(httpx2.TimeoutException):
            httpx2.get(f"{site.worker}/healthz", timeout=0.5)
    finally:
        site.worker_process.send_signal(signal.SIGCONT)
    assert httpx2.get(f"{site.worker}/healthz", timeout=20).json() == {"status": "ok"}


@pytest.mark.parametrize("part", ["web", "worker"])
def test_both_forms_say_the_same(site: Site, part: str) -> None:
    plain, open_metrics = site.text_of(part), site.text_of(part, OPENMETRICS)
    assert open_metrics.endswith("# EOF\n")
    families: list[Metric] = list(parse_openmetrics(open_metrics))  # type: ignore[no-untyped-call]
    assert {family.name for family in families} == {family.name for family in parse_text(plain)}
    for family in families:
        assert family.documentation, family.name
        assert family.type != "unknown", family.name


def test_an_odd_wish_for_a_form_gets_the_plain_one(site: Site) -> None:
    for accept in ("application/openmetrics-text; version=x", "text/plain;version=1.x.0", ";=,;"):
        assert site.text_of("worker", accept).startswith("# HELP")


@needs_promtool
@pytest.mark.parametrize("part", ["web", "worker"])
def test_promtool_finds_nothing_wrong(site: Site, part: str) -> None:
    promtool("check", "metrics", said=site.text_of(part))


def test_no_label_tells_of_a_user(site: Site) -> None:
    values: dict[tuple[str, str], set[str]] = {}
    for family in site.families().values():
        for sample in family.samples:
            for label, text in sample.labels.items():
                values.setdefault((family.name, label), set()).add(text)
    every = {text for found in values.values() for text in found}
    for secret in (
        OWNER_NAME,
        "private-talk",
        "example.org",
        str(site.receiver_port),
        "pgs_",
        "127.",
    ):
        assert not [text for text in every if secret in text], secret
    assert not [text for text in every if re.search(r"[0-9a-f]{8}-[0-9a-f]{4}", text)]
    routes = {getattr(route, "path", "") for route in create_app(site.settings).routes} | {"none"}
    for (name, label), found in values.items():
        assert found <= routes if label == "route" else len(found) < 20, (name, label, found)


def test_error_codes_do_not_grow_without_end() -> None:
    codes = _Codes()
    labels = {codes.label(f"code_{number}") for number in range(10 * MAX_CODES)}
    assert len(labels) == MAX_CODES + 1
    assert codes.label("Speaks: of /home/anna") == "other"
    assert codes.label(None) == "none"


def documented() -> dict[str, tuple[str, frozenset[str]]]:
    """Return the types and labels of the metrics that docs/metrics.md lists."""
    rows = re.findall(
        r"^\| `(pgscribe_\w+)` \| (\w+) \|\s*(.*?)\s*\| .+ \|$",
        (REPO / "docs" / "metrics.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == len({name for name, _, _ in rows})
    return {
        name.removesuffix("_total"): (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in rows
    }


def labels_of(family: Metric) -> frozenset[str]:
    return frozenset(label for sample in family.samples for label in sample.labels) - {"le"}


def test_the_documentation_lists_what_there_is(site: Site) -> None:
    exported = {
        name: (family.type, labels_of(family))
        for name, family in site.families().items()
        if not name.startswith("process_")
    }
    assert exported == documented()


def expressions() -> list[str]:
    """Return what the dashboard and the alerts ask Prometheus for."""
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text(encoding="utf-8"))
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    alerts = (MONITORING / "alerts.yml").read_text(encoding="utf-8")
    asked = [
        text.replace("''", "'") for text in re.findall(r"^ +expr: '(.*)'$", alerts, re.MULTILINE)
    ]
    assert len(shown) > 60
    assert len(asked) == len(ALERTS)
    return shown + asked


ALERTS = re.findall(r"- alert: (\w+)", (MONITORING / "alerts.yml").read_text(encoding="utf-8"))


def test_dashboard_and_alerts_ask_for_what_there_is(site: Site) -> None:
    families = site.families()
    there_is = set(families) | {
        sample.name for family in families.values() for sample in family.samples
    }
    for expression in expressions():
        names = set(re.findall(r"\b(?:pgscribe|process)_\w+", expression))
        names = {name for name in names if f'"{name}' not in expression}
        assert names <= there_is or re.search(r"\bup\{", expression), expression
        for name, matchers in re.findall(r"\b(pgscribe_\w+)\{(.*?)\}", expression):
            base = re.sub(r"_(total|bucket|count|sum)$", "", name)
            family = families.get(name) or families[base]
            asked = set(re.findall(r"(\w+)(?:=|!=|=~|!~)\"", matchers))
            assert asked - {"le", "job"} <= labels_of(family), expression
    shown = set(re.findall(r"\bpgscribe_\w+", " ".join(expressions())))
    unused = {
        name
        for name in families
        if name.startswith("pgscribe_")
        and not any(used.removesuffix("_total").startswith(name) for used in shown)
    }
    assert unused == set(), "what nobody looks at"


@needs_promtool
def test_promtool_reads_each_expression(tmp_path: Path) -> None:
    rules = [
        {"record": f"test:expression_{number}", "expr": text.replace("$__rate_interval", "5m")}
        for number, text in enumerate(expressions())
    ]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "test", "rules": rules}]}))
    promtool("check", "rules", str(file))
    promtool("check", "rules", str(MONITORING / "alerts.yml"))


@needs_promtool
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    scenarios = (REPO / "tests" / "monitoring" / "alerts.yml").read_text(encoding="utf-8")
    assert set(re.findall(r'alertname="(\w+)"', scenarios)) == set(ALERTS)
    file = tmp_path / "alerts.yml"
    file.write_text(scenarios.replace("[ALERTS]", f"[{MONITORING / 'alerts.yml'}]"))
    promtool("test", "rules", str(file))


@needs_promtool
def test_the_configuration_of_prometheus_is_one(tmp_path: Path) -> None:
    """But for the file of the key, which is on another machine."""
    text = (MONITORING / "prometheus.yml").read_text(encoding="utf-8")
    (tmp_path / "key").touch()
    shutil.copy(MONITORING / "alerts.yml", tmp_path)
    file = tmp_path / "prometheus.yml"
    file.write_text(text.replace("/etc/prometheus/pgscribe.key", str(tmp_path / "key")))
    promtool("check", "config", str(file))


def test_each_alert_says_what_to_do() -> None:
    alerts = (MONITORING / "alerts.yml").read_text(encoding="utf-8")
    links = re.findall(r"runbook_url: docs/alerts\.md#(\w+)", alerts)
    assert links == [name.lower() for name in ALERTS]
    text = (REPO / "docs" / "alerts.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == set(ALERTS)
    runbook = (REPO / "docs" / "runbook.md").read_text(encoding="utf-8")
    sections = {
        title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", runbook, re.MULTILINE)
    }
    steps = set(re.findall(r"runbook\.md#([\w-]+)", text))
    assert len(steps) >= 6
    assert steps <= sections


def test_while_the_database_is_away_whoever_was_let_in_is_told_so(
    settings: Settings,
    postgres: EmbeddedPostgres,
    database: str,
    conn: psycopg.Connection,
    user: UUID,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user,))
    known, stranger, revoked = (
        keys.create(conn, name, user_id=user, scopes=(Scope.OPERATE,))
        for name in ("known", "stranger", "revoked")
    )
    headers = [bearer(secret) for _, secret in (known, stranger, revoked)]
    monkeypatch.setattr(metrics, "PATIENCE", 0.5)
    monkeypatch.setattr("web.routes.health.PATIENCE", 0.5)
    monkeypatch.setattr("web.routes.health.FRESH", 0.0)
    app = create_app(settings)
    with serve(app) as web:

        def is_up() -> float:
            return samples(read(web, headers[0]).text)["pgscribe_database_up", ()]

        assert httpx2.get(f"{web}/readyz").json() == {"status": "ok"}
        assert is_up() == 1
        assert read(web, headers[2]).status_code == HTTPStatus.OK
        keys.revoke(conn, revoked[0].id)
        assert read(web, headers[2]).status_code == HTTPStatus.UNAUTHORIZED

        with cut_off(postgres, database, conn):
            remembered = app.state.scrapes._let_in  # noqa: SLF001 - nobody waits for 15 minutes
            before = dict(remembered)
            found = samples(read(web, headers[0]).text)
            assert remembered == before, "for 15 minutes, however often they ask"
            assert found["pgscribe_database_up", ()] == 0
            assert not [name for name, _ in found if name.startswith("pgscribe_jobs")]
            assert value(found, "pgscribe_pool_max_connections") > 0
            for others in headers[1:]:
                assert read(web, others).status_code == HTTPStatus.SERVICE_UNAVAILABLE
            assert read(web, bearer("x.y.z")).status_code == HTTPStatus.UNAUTHORIZED
            ready = httpx2.get(f"{web}/readyz", timeout=20)
            assert ready.status_code == HTTPStatus.SERVICE_UNAVAILABLE
            assert ready.json() == {"status": "unready", "reason": "database"}
            assert httpx2.get(f"{web}/healthz").json() == {"status": "ok"}

        until(is_up, "the database is back")
        with conn.transaction():
            conn.execute("lock table pgscribe.api_keys in access exclusive mode")
            answer = read(web, headers[0])  # it does not wait for as long as the database does
            assert samples(answer.text)["pgscribe_database_up", ()] == 0
            monkeypatch.setattr(metrics, "REMEMBERED", 0.0)
            assert read(web, headers[0]).status_code == HTTPStatus.SERVICE_UNAVAILABLE


def test_who_was_let_in_is_known_by_all_that_they_sent() -> None:
    def asking(*cookies: bytes) -> Request:
        return Request({"type": "http", "headers": [(b"cookie", each) for each in cookies]})

    scrapes = metrics.Scrapes()
    scrapes.let_in(asking(b"theme=dark", b"session=theirs"))
    assert scrapes.knows(asking(b"theme=dark", b"session=theirs"))
    assert not scrapes.knows(asking(b"theme=dark", b"session=guessed"))


def test_a_web_server_is_ready_with_all_migrations_and_a_folder(
    settings: Settings, conn: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.routes.health.FRESH", 0.0)
    ledger = "supabase_migrations.schema_migrations"
    with serve(create_app(settings)) as web:

        def asked() -> tuple[int, dict[str, str]]:
            answer = httpx2.get(f"{web}/readyz")
            return answer.status_code, answer.json()

        conn.execute(f"insert into {ledger} (version) values ('99991231235959')".encode())
        assert asked() == (200, {"status": "ok"}), "a newer version's migrations do no harm"
        conn.execute(
            f"delete from {ledger} where version = (select max(version) from {ledger}"
            " where version < '9999')".encode()
        )
        assert asked() == (503, {"status": "unready", "reason": "migrations"})
        conn.execute(f"alter table {ledger} rename to renamed".encode())
        assert asked() == (503, {"status": "unready", "reason": "migrations"})
    settings.storage_dir.write_text("no folder")
    conn.execute("alter table supabase_migrations.renamed rename to schema_migrations")
    conn.execute(
        f"insert into {ledger} (version) select unnest(%s::text[]) on conflict do nothing".encode(),
        ([migration.version for migration in migrate.migrations()],),
    )
    with serve(create_app(settings)) as web:
        assert httpx2.get(f"{web}/readyz").json() == {"status": "unready", "reason": "storage"}


def test_what_was_tried_before_waits_since_it_could_be_tried_again(
    postgres: EmbeddedPostgres, database: str, conn: psycopg.Connection, user: UUID
) -> None:
    name = str(psycopg.conninfo.conninfo_to_dict(database)["dbname"])
    conn.execute(
        "insert into processing_jobs (user_id, file_path, webhook_url)"
        " values (%s, 'a/b', 'https://example.org')",
        (user,),
    )
    conn.execute(
        "insert into webhook_deliveries (user_id, url, event, payload)"
        " values (%s, 'https://example.org', 'job.failed', '{}')",
        (user,),
    )
    tables = ("processing_jobs", "webhook_deliveries")
    with psycopg.connect(postgres.url(user=SUPERUSER, database=name), autocommit=True) as admin:
        admin.execute("set session_replication_role = replica")
        for table in tables:
            admin.execute(
                f"update {table} set created_at = now() - interval '2 h', due_at = now()".encode()
            )
        admin.execute("update processing_jobs set attempt = 1")
        admin.execute("set session_replication_role = origin")
        for table in tables:  # as a claim does with what has fallen due
            admin.execute(f"update {table} set due_at = null".encode())
        jobs, light = (
            admin.execute(f"select pgscribe.metrics_of_{kind}()".encode()).fetchone()
            for kind in ("jobs", "light_jobs")
        )
    assert jobs is not None
    assert light is not None
    ages = [row["oldest"] for row in jobs[0]["jobs"] if row["jobs"]]
    ages += [row["oldest"] for row in light[0]["deliveries"] if row["count"]]
    assert len(ages) == 2
    assert max(ages) < 60


def test_a_wait_begins_when_a_job_could_last_have_started(
    postgres: EmbeddedPostgres, database: str, conn: psycopg.Connection, user: UUID
) -> None:
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, 'a/b') returning id, job_id",
        (user,),
    ).fetchone()
    assert row is not None
    values = {"job_id": row[0]}
    assert conn.execute(CALLS["waited_seconds"], values).fetchone() == (None,), "it does not run"
    name = str(psycopg.conninfo.conninfo_to_dict(database)["dbname"])
    steps = {
        60: "update processing_jobs set status = 'processing', attempt = 2,"
        " created_at = AGO(100), started_at = AGO(40)",
        10: "update processing_jobs set scheduled_at = AGO(50)",
        5: "update processing_jobs set retry_requested_at = AGO(45)",
        3: "update procrastinate.procrastinate_jobs set scheduled_at = AGO(43)",
        1: "insert into processing_job_attempts (job_id, attempt, started_at, ended_at, outcome)"
        " select id, 1, AGO(90), AGO(41), 'released' from processing_jobs",
        0: "update processing_job_attempts set ended_at = AGO(39)",
    }
    with psycopg.connect(postgres.url(user=SUPERUSER, database=name)) as admin:
        admin.execute("set session_replication_role = replica")
        for waited, step in steps.items():
            statement = re.sub(r"AGO\((\d+)\)", r"now() - interval '\1 s'", step)
            admin.execute(statement.encode())
            assert admin.execute(CALLS["waited_seconds"], values).fetchone() == (waited,)
