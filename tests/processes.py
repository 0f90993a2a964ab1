"""The real commands as processes: a web server and workers, started as users start them."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2

from jobs.settings import Settings
from tests.faults.fleet import until


def environment(settings: Settings, **others: str) -> dict[str, str]:
    """Return the environment that commands with these settings need."""
    assert settings.jwt_secret is not None
    return (
        os.environ
        | {
            "PGSCRIBE_DATABASE_URL": settings.database_url.get_secret_value(),
            "PGSCRIBE_JWT_SECRET": settings.jwt_secret.get_secret_value(),
            "PGSCRIBE_STORAGE_DIR": str(settings.storage_dir),
            "PGSCRIBE_MODELS_DIR": str(settings.models_dir),
            "PGSCRIBE_SCRATCH_DIR": str(settings.scratch_dir),
        }
        | others
    )


@contextmanager
def command(
    log: Path, env: Mapping[str, str], *arguments: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``pgscribe`` with these arguments; what it says on standard error goes to ``log``."""
    with log.open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *arguments, "--stop-with-stdin"],
            env=dict(env),
            stdin=subprocess.PIPE,
            stderr=said,
        )
    try:
        yield process
    finally:
        process.terminate()
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)


def engine_processes() -> set[int]:
    """Return the process ids of this process's children that serve calls to engines."""
    found = set()
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with suppress(OSError):  # threads and processes end while they are looked at
            for pid in children.read_text().split():
                with suppress(OSError):
                    if "jobs.compute.engine_process" in Path(f"/proc/{pid}/cmdline").read_text():
                        found.add(int(pid))
    return found


def wait_for_web(url: str) -> None:
    """Return once a web server answers."""

    def answers() -> bool:
        try:
            return httpx2.get(f"{url}/healthz").is_success
        except httpx2.TransportError:
            return False

    until(answers, f"{url} answers")
