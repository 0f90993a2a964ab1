"""The web app's pages in Chromium: ``python -m benchmarks.pages``.

One `pgscribe web` process and one embedded Postgres of the benchmark's own; the user has 100
completed jobs, one of which is a transcript of four hours: 40,000 words in 4,000 segments. Each
round opens each page in a browser that has nothing in its cache, on the machine's processor as it
is and slowed down (Chrome's own throttling).

- kB, requests: what loading the page takes, without what the player fetches of the recording.
- readable: from the navigation until what people came for has been painted: rows, segments.
- frame: what the main thread works for one frame while the recording plays in its middle; of
  the 95th percentile it is what passes between two frames, which is 16.7 ms if none is late.

Figures are medians of the rounds. The last line is one JSON object.
"""

import json
import shutil
import statistics
import tempfile
import wave
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import psycopg
from playwright.sync_api import Browser, CDPSession, Page, sync_playwright

from benchmarks.api import SECRET
from db import migrate, named_queries
from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs.settings import Settings
from tests.live import serve
from web.app import create_app

OWNER = UUID(int=1)
EMAIL, PASSWORD = "ann@example.org", "the benchmark's own password"
HOURS = 4
FRAMES = 150
SLOWED = (1, 4)
QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))

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

    def __init__(self, session: CDPSession) -> None:
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
def opened(browser: Browser, where: Site, slowed: int) -> Iterator[tuple[Page, CDPSession]]:
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


def load(page: Page, session: CDPSession, path: str, wanted: str, count: int) -> dict[str, float]:
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
        "readable_ms": float(page.evaluate("() => window.readable")),
        "requests": traffic.requests,
        "kB": traffic.kilobytes,
    }


def play(page: Page, session: CDPSession) -> dict[str, float]:
    """Play from the middle; return what a frame takes."""
    page.wait_for_function("() => document.getElementById('audio').readyState > 0")
    session.send("Performance.enable")
    before = metrics(session)
    p95 = float(page.evaluate(_PLAY, FRAMES))
    worked = metrics(session) - before
    return {"frame_ms": worked * 1000 / (FRAMES + 31), "frame_p95_ms": p95}


def metrics(session: CDPSession) -> float:
    """Return how many seconds the main thread has worked."""
    found = session.send("Performance.getMetrics")["metrics"]
    return float(next(one["value"] for one in found if one["name"] == "TaskDuration"))


def measure_round(browser: Browser, where: Site, slowed: int) -> dict[str, float]:
    """Open each page once."""
    figures: dict[str, float] = {}
    with opened(browser, where, slowed) as (page, session):
        found = load(page, session, "/app", "li.job", 20)
        figures |= {f"list_{name}": value for name, value in found.items()}
    with opened(browser, where, slowed) as (page, session):
        found = load(page, session, f"/app/jobs/{where.long_job}", ".segment", 4000)
        found |= play(page, session)
        figures |= {f"transcript_{name}": value for name, value in found.items()}
    return figures


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Return the medians of all rounds, by how much the processor was slowed down."""
    results: dict[int, list[dict[str, float]]] = {slowed: [] for slowed in SLOWED}
    with site() as where, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"],
        )
        measure_round(browser, where, 1)  # plans, connections, caches of the server
        for _ in range(rounds):
            for slowed in SLOWED:
                results[slowed].append(measure_round(browser, where, slowed))
                click.echo(json.dumps({"slowed": slowed, **rounded(results[slowed][-1])}), err=True)
        browser.close()
    return {
        f"{slowed}x": {name: statistics.median(one[name] for one in found) for name in found[0]}
        for slowed, found in results.items()
    }


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """Return figures without what nobody reads."""
    return {name: round(value, 1) for name, value in figures.items()}


@click.command()
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
def main(rounds: int) -> None:
    """Measure the pages; print a table, and one JSON object as the last line."""
    medians = measure(rounds)
    click.echo(f"{'':28}" + "".join(f"{name:>12}" for name in medians))
    for figure in next(iter(medians.values())):
        cells = "".join(f"{one[figure]:12.1f}" for one in medians.values())
        click.echo(f"{figure:28}{cells}")
    click.echo(json.dumps({name: rounded(one) for name, one in medians.items()}))


if __name__ == "__main__":
    main()
