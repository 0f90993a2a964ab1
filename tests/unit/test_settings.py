from pathlib import Path

import pytest

from jobs.errors import SettingsError
from jobs.settings import CallSettings, ClientSettings, Settings
from modal_functions.config import Config

SECRET = "s3cret-of-at-least-32-characters-x"


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no .env of the developer's
    monkeypatch.delenv("PGSCRIBE_DATABASE_URL", raising=False)


def test_each_unusable_variable_is_named_without_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGSCRIBE_WORKER_CONCURRENCY", "lots")
    monkeypatch.setenv("PGSCRIBE_JWT_SECRET", "too short")
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    for name in ("PGSCRIBE_DATABASE_URL", "PGSCRIBE_WORKER_CONCURRENCY", "PGSCRIBE_JWT_SECRET"):
        assert name in str(caught.value)
    assert "too short" not in str(caught.value)


def test_audio_is_not_kept_for_longer_than_the_job_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", "postgresql://postgres@db/postgres")
    monkeypatch.setenv("PGSCRIBE_KEEP_FAILED_DAYS", "7")
    monkeypatch.setenv("PGSCRIBE_KEEP_AUDIO_DAYS", "7")
    assert Settings.load().keep_audio_days == 7
    monkeypatch.setenv("PGSCRIBE_KEEP_AUDIO_DAYS", "8")
    with pytest.raises(
        SettingsError, match=r"PGSCRIBE_KEEP_AUDIO_DAYS: .* PGSCRIBE_KEEP_FAILED_DAYS \(7\)"
    ):
        Settings.load()


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", "postgresql://postgres:hidden@db/postgres")
    monkeypatch.setenv("PGSCRIBE_JWT_SECRET", SECRET)
    settings = Settings.load()
    assert settings.require_jwt_secret() == SECRET
    assert "hidden" not in repr(settings)
    assert SECRET not in repr(settings)


@pytest.mark.parametrize(
    ("database", "found"),
    [
        ("postgresql://me:hid%2Fden@db/x", {"hid%2Fden", "hid/den"}),
        ("host=db password=hidden user=me", {"hidden"}),
        (r"host=db password = 'hid den\'s' user=me", {r"hid den\'s"}),
        ("host=db password=hid den user=me", {"hid", "den"}),  # libpq names the second
    ],
)
def test_secrets_of_all_kinds_are_known_to_the_log(
    monkeypatch: pytest.MonkeyPatch, database: str, found: set[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-store")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=of%20ours, api-key=of-the-collector")
    known = set(Settings.load(database_url=database, jwt_secret=SECRET).secrets())
    assert known >= found | {SECRET, database}
    assert known >= {"of-the-store", "of%20ours", "of ours", "of-the-collector"}


def test_environment_beats_dotenv_beats_the_running_dev_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".pgscribe").mkdir()
    (tmp_path / ".pgscribe" / "dev.env").write_text(
        "PGSCRIBE_URL='http://dev'\nPGSCRIBE_TOKEN='dev'\n"
    )
    assert ClientSettings.load().url == "http://dev"
    (tmp_path / ".env").write_text("PGSCRIBE_URL=http://dotenv\n")
    assert ClientSettings.load().url == "http://dotenv"
    monkeypatch.setenv("PGSCRIBE_URL", "http://environment")
    assert ClientSettings.load().url == "http://environment"
    assert ClientSettings.load().token.get_secret_value() == "dev"


def test_a_client_without_a_server_learns_how_to_get_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PGSCRIBE_TOKEN", raising=False)
    with pytest.raises(SettingsError, match=r"PGSCRIBE_TOKEN: Field required .*pgscribe dev"):
        ClientSettings.load()


@pytest.mark.parametrize("name", ["", "transcription"])
def test_workers_and_deployments_have_one_name_for_the_app(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("PGSCRIBE_MODAL_APP_NAME", name)
    assert CallSettings.load().modal_app_name == Config.load().app_name
    monkeypatch.setenv("PGSCRIBE_MODAL_APP_NAME", "two words")
    with pytest.raises(SettingsError, match="PGSCRIBE_MODAL_APP_NAME"):
        CallSettings.load()


@pytest.mark.parametrize(("gpu", "price"), [("", 0.000222), ("h100!, L4", 0.001097), ("ANY", 0.0)])
def test_a_gpu_costs_as_much_as_the_first_of_those_that_will_do(
    monkeypatch: pytest.MonkeyPatch, gpu: str, price: float
) -> None:
    monkeypatch.setenv("PGSCRIBE_DATABASE_URL", "postgresql://postgres@db/postgres")
    monkeypatch.setenv("PGSCRIBE_MODAL_GPU", gpu)
    settings = Settings.load()
    assert settings.gpu_second_price == pytest.approx(price + settings.cpu_second_price)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PGSCRIBE_DATABASE_URL", "mysql://localhost/x", "must begin with postgresql://"),
        ("PGSCRIBE_DATABASE_URL", "https://:hidden@x/", "must begin with postgresql://"),
        ("PGSCRIBE_DATABASE_URL", "postgres://u:p@hidden@x/", "has two @ .* password as %40"),
        ("PGSCRIBE_URL", "localhost:8000", "must begin with https:// or http://"),
    ],
)
def test_what_can_be_no_address_is_refused_before_anything_connects(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv("PGSCRIBE_TOKEN", "token")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"{variable}: {said}") as refused:
        (Settings if variable == "PGSCRIBE_DATABASE_URL" else ClientSettings).load()
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["", "host=db dbname=postgres", "postgres://u:p@db/post@gres?user=a@b", "dbname=x://"]
)
def test_a_database_may_be_named_in_each_way_that_libpq_knows(url: str) -> None:
    assert Settings.load(database_url=url).database_url.get_secret_value() == url


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"PGSCRIBE_TOKEN=\xff\xfe")
    with pytest.raises(SettingsError, match=r"\.env: is not UTF-8"):
        ClientSettings.load()
