"""Pictures of the app for the documentation: `make screenshots` copies them into docs/screenshots.

Names, numbers, locale and time zone are fixed, so that only what pages look like changes them.
"""

import math
import shutil
from pathlib import Path
from random import Random
from typing import Any, Literal
from uuid import UUID

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import SLOW, Site, running_worker, sign_in
from tests.browser.seed import Seed
from tests.conftest import REPO

FOLDER = REPO / ".pgscribe" / "screenshots"
OTHERS = ["bo@example.org", "chloe@example.org", "podcasts@radio.example.org", "dan@example.org"]
PROBLEMS = {
    "no_speech": "'voicemail 0142.m4a' is silent: no speech was found in it",
    "invalid_audio": "'slides.mp3' is no audio that ffmpeg can read",
    "call_timeout": "A call took longer than 600 s",
    "url_unavailable": "https://cdn.example.org/episode-41.mp3 answered 503",
}
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
Scheme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def ann(site: Site) -> UUID:
    """An operator with an address that may be shown."""
    user = UUID(int=1)
    site.conn.execute("insert into auth.users (id, email) values (%s, 'ann@example.org')", (user,))
    site.conn.execute("insert into pgscribe.operators (user_id) values (%s)", (user,))
    return user


@pytest.fixture(scope="module")
def interview(site: Site, seed: Seed, ann: UUID, sample: Path) -> UUID:
    """A recording that a worker has transcribed, and speakers named."""
    name = "Interview with the last keeper.mp3"
    folder = site.settings.storage_dir / str(ann)
    folder.mkdir(parents=True)
    shutil.copy(sample, folder / name)
    row = site.conn.execute(
        "insert into processing_jobs (user_id, file_path, options) values (%s, %s,"
        """ '{"model": "base", "word_timestamps": true}') returning id""",
        (ann, f"{ann}/{name}"),
    ).fetchone()
    assert row is not None
    page = open_page(site)
    with running_worker(site):
        page.goto(f"/app/jobs/{row[0]}")
        expect(page.locator("#segments .segment").first).to_be_visible(timeout=SLOW)
    count = page.locator(".segment").count()
    site.conn.cursor().executemany(
        "insert into transcript_corrections (job_id, segment, speaker) values (%s, %s, %s)",
        [(row[0], at, "Ann Fischer" if at < 2 else "Tom Hale") for at in range(count)],
    )
    fill(site, seed, ann)
    job_id: UUID = row[0]
    return job_id


def open_page(site: Site, **options: Any) -> Page:
    page = site.open(timezone_id="UTC", **{**DESKTOP, **options})
    sign_in(page, "ann@example.org")
    return page


def fill(site: Site, seed: Seed, ann: UUID) -> None:
    """Insert what makes lists and charts look as they do where people work."""
    chance = Random(7)
    owners = [ann]
    for number, email in enumerate(OTHERS, 2):
        site.conn.execute(
            "insert into auth.users (id, email) values (%s, %s)", (UUID(int=number), email)
        )
        owners.append(UUID(int=number))
    for day in range(1, 14):
        for _ in range(round((6 + 3 * math.sin(day)) * (0.4 if day % 7 in {3, 4} else 1))):
            ended(seed, chance, chance.choice(owners[1:]), day * 86400 - 7200, scale=30)
    for half_hour in range(48):
        busy = 1 + math.sin((half_hour + 20) / 48 * 2 * math.pi)
        for _ in range(round(5 * busy * chance.uniform(0.6, 1.3)) + 1):
            owner = chance.choices(owners, [1, 5, 3, 8, 2])[0]
            ended(seed, chance, owner if half_hour else owners[1], 1800 * (half_hour + 0.4))
    workers = [seed.worker(silent_for=number) for number in (1, 2, 3)]
    seed.worker(silent_for=400)
    running = [
        ("All hands 2026-11.mp4", 1, 0.62),
        ("Episode 42, raw.wav", 3, 0.18),
        ("Exit interview.m4a", 2, 0.87),
    ]
    for worker, (name, who, progress) in zip(workers, running, strict=True):
        seed.job(
            owners[who], name, "processing", ago=95, worker=worker, progress=progress, seconds=3720
        )
    for number in range(14):
        seed.job(
            owners[3], f"Episode {number + 1}.mp3", "queued", ago=200 - number
        ) if number < 9 else seed.job(owners[1], f"Call {number}.m4a", "queued", ago=90 - number)
    list_of_ann(seed, ann, workers[0])


def ended(seed: Seed, chance: Random, owner: UUID, ago: float, *, scale: float = 1) -> None:
    failed = chance.random() < 0.05
    seconds = chance.lognormvariate(6.7, 0.8)
    cost = seconds / 40 * 0.000164 * scale
    ran = seconds / chance.uniform(14, 24)
    code = chance.choice(list(PROBLEMS)) if failed else None
    status = "failed" if failed else "cancelled" if chance.random() < 0.02 else "completed"
    seed.job(
        owner,
        f"Recording {round(seconds)}.mp3",
        status,
        ago=ago + chance.uniform(0, 600),
        waited=chance.lognormvariate(1.2, 0.9),
        ran=ran,
        seconds=seconds,
        code=code,
        error=code and PROBLEMS[code],
        usage={"calls": 3, "gpu_seconds": seconds / 40, "cpu_seconds": 4, "estimated_cost": cost},
    )


def list_of_ann(seed: Seed, ann: UUID, worker: int) -> None:
    """Jobs in all states, the newest of which are at the top of her list."""
    seed.job(ann, "Quarterly review.mp4", "completed", ago=300, seconds=2914, ran=140)
    seed.job(
        ann,
        "voicemail 0142.m4a",
        "failed",
        ago=200,
        seconds=14,
        code="no_speech",
        error=PROBLEMS["no_speech"],
    )
    seed.job(
        ann, "Focus group, Zürich.wav", "processing", ago=60, worker=worker, progress=0.41,
        seconds=3605, waited=1,
    )  # fmt: skip
    seed.job(ann, "Standup 26 November.m4a", "queued", ago=10)


def shoot(page: Page, name: str) -> None:
    """Keep a picture of what the page shows."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    page.evaluate("() => document.fonts.ready")
    path = FOLDER / f"{name}.png"
    picture = page.screenshot(path=path, animations="disabled", caret="hide")
    size, ratio = page.viewport_size, page.evaluate("() => devicePixelRatio")
    assert size is not None
    assert png_size(picture) == (size["width"] * ratio, size["height"] * ratio)
    # A page with nothing on it is some 10 kB; more than this is too much for a README.
    assert 20_000 < len(picture) < 300_000


def png_size(picture: bytes) -> tuple[int, int]:
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(picture[16:20]), int.from_bytes(picture[20:24])


@pytest.mark.usefixtures("interview")
def test_list(site: Site) -> None:
    page = open_page(site)
    expect(page.locator("li.job", has_text="Interview")).to_be_visible()
    expect(page.locator(".live.connected")).to_be_visible()
    shoot(page, "list")
    phone = open_page(site, **PHONE)
    expect(phone.locator("li.job", has_text="Interview")).to_be_visible()
    shoot(phone, "list-phone")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_transcript(site: Site, interview: UUID, scheme: Scheme) -> None:
    page = open_page(site, color_scheme=scheme)
    page.goto(f"/app/jobs/{interview}?t=14.5")
    expect(page.locator(".word.lit")).to_be_visible()
    shoot(page, f"transcript-{scheme}")
    if scheme == "light":
        phone = open_page(site, **PHONE)
        phone.goto(f"/app/jobs/{interview}?t=14.5")
        expect(phone.locator(".word.lit")).to_be_visible()
        shoot(phone, "transcript-phone")


@pytest.mark.usefixtures("interview")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_operate(site: Site, scheme: Scheme) -> None:
    page = open_page(site, color_scheme=scheme)
    page.goto("/app/operate")
    expect(page.locator(".live.connected")).to_be_visible()
    expect(page.locator("#throughput svg")).to_be_visible()
    expect(page.locator("#jobs tr")).to_have_count(50)
    shoot(page, f"operate-{scheme}")


def test_sign_in(site: Site) -> None:
    page = site.open(timezone_id="UTC", viewport={"width": 1280, "height": 720})
    page.goto("/app/sign-in")
    page.get_by_label("E-mail address").fill("ann@example.org")
    shoot(page, "sign-in")
