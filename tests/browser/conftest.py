"""The web app in a real browser: Chromium, a real server, a real worker with real weights."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import ffmpeg
import imageio_ffmpeg
import psycopg
import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    expect,
    sync_playwright,
)

from db.embedded import EmbeddedPostgres
from jobs.settings import Settings
from tests.browser.seed import Seed, seeding
from tests.conftest import TEMPLATE
from tests.live import serve
from web.app import create_app

PASSWORD = "the password of the tests"
SLOW = 180_000  # milliseconds for what a worker does on a busy machine
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update", "--autoplay-policy=no-user-gesture-required",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
]  # fmt: skip


# A browser, a server and a worker are a load of their own: two more would make time-outs of waits.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run no other test of a browser beside one, and only one of another kind."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("heavy")


expect.set_options(timeout=30_000)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser. CI has to have one."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("CI"):
        pytest.fail("CI needs a browser: install chromium")
    pytest.skip("no Chromium here; on Debian: apt-get install chromium")


@pytest.fixture(scope="module")
def speech(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 12 s of the sample, as WAV at 48 kHz, which Chromium takes for a microphone."""
    path = tmp_path_factory.mktemp("audio") / "speech.wav"
    recording = ffmpeg.input(str(sample), t=12).output(str(path), ac=1, ar=48000)
    recording.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    return path


# Playwright runs an event loop in this thread, beside which no other can run: it ends with the
# module.
@pytest.fixture(scope="module")
def browser(chromium: str, speech: Path) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        microphone = f"--use-file-for-fake-audio-capture={speech}"
        yield playwright.chromium.launch(executable_path=chromium, args=[*ARGUMENTS, microphone])


@dataclass
class Site:
    """A server with its database, and what it takes to look at it as a user."""

    url: str
    conn: psycopg.Connection
    settings: Settings
    browser: Browser
    contexts: list[BrowserContext] = field(default_factory=list)

    def new_user(self) -> tuple[UUID, str]:
        """Return a new user's id and e-mail address."""
        user = uuid4()
        email = f"user-{user.hex[:8]}@example.org"
        self.conn.execute("insert into auth.users (id, email) values (%s, %s)", (user, email))
        return user, email

    def open(self, **options: Any) -> Page:
        """Return a page of a browser that has never been here; ``options`` as of Playwright."""
        context = self.browser.new_context(base_url=self.url, locale="en-GB", **options)
        self.contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", _note_errors)
        return page


#: What pages have complained of since the test began: errors, and what their policy has refused.
complaints: list[str] = []


def _note_errors(said: ConsoleMessage) -> None:
    if said.type == "error":
        complaints.append(said.text)


@pytest.fixture(autouse=True)
def _no_complaints(browser: Browser) -> Iterator[None]:
    """Fail a test during which a page has complained of what the test does not expect.

    Its pages go with it: what they would go on to ask, or complain of, is of no interest, and not
    the next test's fault.
    """
    complaints.clear()
    yield
    found = list(complaints)
    for context in browser.contexts:
        context.close()
    assert not found


@pytest.fixture
def complained() -> list[str]:
    """What pages have complained of. A test that provokes some takes it out."""
    return complaints


@pytest.fixture(scope="module")
def site(
    browser: Browser,
    postgres: EmbeddedPostgres,
    tmp_path_factory: pytest.TempPathFactory,
    models_dir: Path,
) -> Iterator[Site]:
    """A server. No worker runs: `worker` starts one."""
    folder = tmp_path_factory.mktemp("browser")
    name = f"browser_{uuid4().hex[:8]}"
    postgres.create_database(name, template=TEMPLATE)
    settings = Settings.load(
        database_url=postgres.url(database=name),
        jwt_secret="a secret of thirty-two characters or more",
        storage_dir=folder / "storage",
        models_dir=models_dir,
        scratch_dir=folder / "scratch",
        local_sign_in_password=PASSWORD,
        sign_in_rate_limit=0,
        rate_limit=0,
    )
    url = settings.database_url.get_secret_value()
    with psycopg.connect(url, autocommit=True) as conn, serve(create_app(settings)) as base:
        site = Site(base, conn, settings, browser)
        yield site
        for context in site.contexts:
            context.close()
    postgres.drop_database(name)


@pytest.fixture(scope="module")
def seed(site: Site, postgres: EmbeddedPostgres) -> Iterator[Seed]:
    """What puts jobs into the site's database as if they had been run."""
    with seeding(postgres, site.conn.info.dbname, site.settings.storage_dir) as seed:
        yield seed


@contextmanager
def running_worker(site: Site, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `pgscribe worker` on the site's database."""
    settings = site.settings
    own = {
        "PGSCRIBE_DATABASE_URL": settings.database_url.get_secret_value(),
        "PGSCRIBE_JWT_SECRET": settings.require_jwt_secret(),
        "PGSCRIBE_STORAGE_DIR": str(settings.storage_dir),
        "PGSCRIBE_MODELS_DIR": str(settings.models_dir),
        "PGSCRIBE_SCRATCH_DIR": str(settings.scratch_dir),
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "worker"], env=os.environ | own | environment
    )
    try:
        yield worker
    finally:
        worker.terminate()
        worker.wait(60)


@pytest.fixture(scope="module")
def worker(site: Site) -> Iterator[subprocess.Popen[bytes]]:
    """A worker for as long as the module's tests run."""
    with running_worker(site) as process:
        yield process


def sign_in(page: Page, email: str, path: str = "/app") -> None:
    """Sign in as a user would, and be at ``path``."""
    page.goto(path)
    page.get_by_label("E-mail address").fill(email)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    page.wait_for_url(path)


@pytest.fixture
def user(site: Site) -> tuple[UUID, str]:
    """A new user's id and e-mail address."""
    return site.new_user()


@pytest.fixture
def page(site: Site, user: tuple[UUID, str]) -> Page:
    """The list of jobs, as a new user sees it."""
    page = site.open()
    sign_in(page, user[1])
    return page


@pytest.fixture(scope="module")
def long_recording(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample three times, so that it is transcribed in several chunks."""
    path = tmp_path_factory.mktemp("audio") / "three times.mp3"
    recording = ffmpeg.input(str(sample), stream_loop=2).output(str(path), c="copy")
    recording.run(cmd=imageio_ffmpeg.get_ffmpeg_exe(), quiet=True)
    return path
