"""The web app's pages in Chromium."""

import json
import shutil
import tempfile
import wave
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg

from benchmarks.figures import Measurement, Section
from benchmarks.web_process import SECRET
from db import migrate, named_queries
from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs.settings import Settings
from tests.live import serve
from web.app import create_app

if TYPE_CHECKING:
    from playwright.sync_api import Browser, CDPSession, Page

OWNER = UUID(int=1)
EMAIL, PASSWORD = "ann@example.org", "the benchmark's own password"
ROUNDS = 3
HOURS = 4
FRAMES, FRAMES_QUICK = 150, 10
SLOWED = {"as it is": 1, "slowed down 4x": 4}
QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))

METHOD = f"""\
Chromium opens pages of a web server on an embedded Postgres; the user has 100 completed jobs, one
of which is a transcript of {HOURS} hours: 40,000 words in 4,000 segments. Each page is opened by a
browser that is signed in and has nothing in its cache, on the machine's processor as it is, and
slowed down four times (Chrome's own throttling). At most {ROUNDS} rounds.

- Can be read: from the navigation until what people came for has been painted: 20 rows of the list,
  all 4,000 segments of the transcript.
- kB and requests: what loading the page takes, without what the player fetches of the recording.
- Frame: what the main thread works for one frame while the recording plays in its middle; and the
  95th percentile of what passes between two frames, which is 16.7 ms if none is late."""

# Notes when the first of what was waited for has been painted, and when all of it is there.
_WATCH = """
(() => {
  const [wanted, count] = JSON.parse(sessionStorage.getItem("benchmark") ?? '["", 0]');
  if (!wanted) return;
  new MutationObserver((_, observer) => {
    if (document.querySelectorAll(wanted).length < count) return;
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => { window.readable = performance.now(); }));
  }).observe(document, { childList: true, subtree: true });
})();
"""
_PLAY = """
async (frames) => {
  const audio = document.getElementById("audio");
  audio.currentTime = audio.duration / 2;
  await audio.play();
  const next = () => new Promise(requestAnimationFrame);
  for (let n = 0; n < 30; n++) await next();
  window.started = await next();
  const gaps = [];
  for (let n = 0, last = window.started; n < frames; n++) {
    const now = await next();
    gaps.push(now - last);
    last = now;
  }
  return gaps.sort((a, b) => a - b)[Math.floor(frames * 0.95)];
}
"""


@dataclass(frozen=True)
class Site:
    """Where the app is, and its long transcript."""

    url: str
    long_job: UUID


@contextmanager
def site() -> Iterator[Site]:
    """Run the app on a database of its own."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(EmbeddedPostgres(folder / "postgres"))
        postgres.create_database("pages")
        postgres.bootstrap("pages")
        url = postgres.url(database="pages")
        migrate.migrate(url)
        settings = Settings.load(
            database_url=url,
            jwt_secret=SECRET,
            storage_dir=folder / "storage",
            scratch_dir=folder / "scratch",
            local_sign_in_password=PASSWORD,
            rate_limit=0,
            sign_in_rate_limit=0,
        )
        long_job = fill(postgres.url(database="pages", user=SUPERUSER))
        write_silence(folder / "storage" / str(OWNER) / "four hours.wav", HOURS * 3600)
        yield Site(stack.enter_context(serve(create_app(settings))), long_job)


def fill(url: str) -> UUID:
    """Insert the user and their jobs; return the long one."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("set session_replication_role = replica")  # the rows bring all they need
        conn.execute("insert into auth.users (id, email) values (%s, %s)", (OWNER, EMAIL))
        row = conn.execute(QUERIES["fill"], {"owner": OWNER}).fetchone()
        conn.execute("vacuum analyze")
    assert row is not None
    job_id: UUID = row[0]
    return job_id


def write_silence(path: Path, seconds: int) -> None:
    """Write a recording in which nothing is heard, as a file with a hole."""
    path.parent.mkdir(parents=True)
    size = 2 * 8000 * seconds
    with wave.open(str(path), "wb") as recording:
        recording.setparams((1, 2, 8000, 1, "NONE", ""))
        recording.writeframes(b"\0\0")
    with path.open("r+b") as file:
        for offset, value in ((4, 36 + size), (40, size)):
            file.seek(offset)
            file.write(value.to_bytes(4, "little"))
        file.truncate(44 + size)


class Traffic:
    """Counts what a page loads."""

    def __init__(self, session: "CDPSession") -> None:
        self._urls: dict[str, str] = {}
        self._sizes: dict[str, float] = {}
        session.send("Network.enable")
        session.on("Network.requestWillBeSent", self._sent)
        session.on("Network.loadingFinished", self._finished)

    def _sent(self, event: dict[str, Any]) -> None:
        self._urls[event["requestId"]] = event["request"]["url"]

    def _finished(self, event: dict[str, Any]) -> None:
        if "/audio" not in self._urls.get(event["requestId"], ""):
            self._sizes[event["requestId"]] = event["encodedDataLength"]

    @property
    def requests(self) -> int:
        """How many have finished."""
        return len(self._sizes)

    @property
    def kilobytes(self) -> float:
        """What they brought, with their headers."""
        return sum(self._sizes.values()) / 1000


@contextmanager
def opened(browser: "Browser", where: Site, slowed: int) -> Iterator[tuple["Page", "CDPSession"]]:
    """Yield a page of a browser that is signed in, has loaded nothing yet, and is slow."""
    context = browser.new_context(base_url=where.url, viewport={"width": 1280, "height": 860})
    page = context.new_page()
    page.goto("/app/sign-in")
    page.get_by_label("E-mail address").fill(EMAIL)
    page.get_by_label("Password").fill(PASSWORD)
    with page.expect_navigation(url="/app", wait_until="commit"):
        page.get_by_role("button", name="Sign in").click()
    session = context.new_cdp_session(page)
    page.goto("/app/nowhere")
    session.send("Network.clearBrowserCache")
    session.send("Emulation.setCPUThrottlingRate", {"rate": slowed})
    yield page, session
    context.close()


def load(
    page: "Page", session: "CDPSession", path: str, wanted: str, count: int
) -> dict[str, float]:
    """Open a page; return what it took until so many of what is wanted can be read."""
    traffic = Traffic(session)
    page.evaluate(
        "(what) => sessionStorage.setItem('benchmark', what)", json.dumps([wanted, count])
    )
    page.add_init_script(_WATCH)
    page.goto(path)
    page.wait_for_function("() => window.readable", timeout=120_000)
    page.wait_for_load_state("load")
    return {
        "readable": float(page.evaluate("() => window.readable")) / 1000,
        "requests": traffic.requests,
        "kb": traffic.kilobytes,
    }


def play(page: "Page", session: "CDPSession", frames: int) -> dict[str, float]:
    """Play from the middle; return what a frame takes."""
    page.wait_for_function("() => document.getElementById('audio').readyState > 0")
    session.send("Performance.enable")
    before = metrics(session)
    p95 = float(page.evaluate(_PLAY, frames))
    worked = metrics(session) - before
    return {"frame": worked * 1000 / (frames + 31), "frame-p95": p95}


def metrics(session: "CDPSession") -> float:
    """Return how many seconds the main thread has worked."""
    found = session.send("Performance.getMetrics")["metrics"]
    return float(next(one["value"] for one in found if one["name"] == "TaskDuration"))


def measure_round(browser: "Browser", where: Site, slowed: int, frames: int) -> dict[str, float]:
    """Open each page once."""
    figures: dict[str, float] = {}
    with opened(browser, where, slowed) as (page, session):
        found = load(page, session, "/app", "li.job", 20)
        figures |= {f"list-{name}": value for name, value in found.items()}
    with opened(browser, where, slowed) as (page, session):
        found = load(page, session, f"/app/jobs/{where.long_job}", ".segment", 4000)
        found |= play(page, session, frames)
        figures |= {f"transcript-{name}": value for name, value in found.items()}
    return figures


LINES = {
    "list-readable": ("List can be read after", "s"),
    "transcript-readable": (f"Transcript of {HOURS} hours can be read after", "s"),
    "transcript-frame": ("Work for a frame while it plays", "ms"),
    "transcript-frame-p95": ("Between two frames while it plays, p95", "ms"),
    "list-kb": ("List: loaded", "kB"),
    "transcript-kb": ("Transcript: loaded", "kB"),
    "list-requests": ("List: requests", "requests"),
    "transcript-requests": ("Transcript: requests", "requests"),
}


def measure_rounds(
    executable: str, rounds: int, frames: int
) -> Mapping[str, list[dict[str, float]]]:
    """Return the figures of each round, by how fast the processor was."""
    from playwright.sync_api import sync_playwright

    results: dict[str, list[dict[str, float]]] = {name: [] for name in SLOWED}
    with site() as where, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"],
        )
        measure_round(browser, where, 1, frames)  # plans, connections, caches of the server
        for _ in range(rounds):
            for name, slowed in SLOWED.items():
                results[name].append(measure_round(browser, where, slowed, frames))
        browser.close()
    return results


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - the contract
    """Open the pages."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    section = Section("pages", "Web app", METHOD, [])
    if executable is None or find_spec("playwright") is None:
        missing = "the package playwright" if executable else "Chromium"
        return replace(section, left_out={"pages": f"{missing} is not installed"})
    frames = FRAMES_QUICK if quick else FRAMES
    found = measure_rounds(executable, min(rounds, ROUNDS), frames)
    return replace(
        section,
        measurements=[
            Measurement(
                f"pages-{name}",
                what,
                unit,
                "lower",
                {speed: [figures[name] for figures in taken] for speed, taken in found.items()},
                headline=name == "transcript-readable",
            )
            for name, (what, unit) in LINES.items()
        ],
    )
