"""What becomes of jobs while everything is killed, restarted and cut off at random."""

import json
import subprocess
import sys
from typing import Any

from benchmarks.figures import Measurement, Section
from benchmarks.recordings import REPO

SECONDS, SECONDS_QUICK = 60, 8
CUTS = ("disconnect", "cut", "swallow", "hold", "refuse")

METHOD = """\
`python tests/faults/soak.py --seconds {seconds}`, once: four workers with up to four jobs at a
time, some through a proxy, while six users insert, cancel, try again and delete. At random moments
workers get SIGKILL (also just before or after a claim, an end, and each other step), SIGTERM or
SIGSTOP, Postgres is restarted (fast, at once, or by SIGKILL), connections are cut, swallow what
passes or hang, and rows stay locked. Then everything is healed, and jobs that never end by
themselves are cancelled.

The run fails, and then there are no figures, unless: every job whose insert was answered is there
and has ended; row and queue job agree; each completed job completed once and has the result of
its own attempt; no attempt was started twice; no job failed for another reason than what was done
to it. Calls that are paid for are not part of it: `tests/faults/test_calls.py` has those."""


def soak(seconds: int) -> dict[str, Any]:
    """Run it. Raises ``RuntimeError`` with what it says if anything was violated."""
    command = [sys.executable, "tests/faults/soak.py", "--seconds", str(seconds)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{done.stdout}{done.stderr}".strip().splitlines()[-1])
    counts: dict[str, Any] = json.loads(done.stdout.splitlines()[-2])
    return counts


def measure(rounds: int, quick: bool) -> Section:  # noqa: ARG001, FBT001 - the contract
    """Provoke faults for a while, and count."""
    seconds = SECONDS_QUICK if quick else SECONDS
    found = soak(seconds)
    faults, jobs = found["faults"], found["jobs"]
    kills = faults.get("kill_worker", 0) + faults.get("doom_worker", 0)
    lines = (
        ("jobs", "Jobs that ended", "jobs", "higher", sum(jobs.values())),
        ("attempts", "Attempts that were started", "attempts", "higher", found["attempts"]),
        ("kills", "Workers killed (kill -9)", "kills", "higher", kills),
        (
            "restarts",
            "Restarts of Postgres",
            "restarts",
            "higher",
            faults.get("restart_postgres", 0),
        ),
        ("cuts", "Cuts of connections", "cuts", "higher", sum(faults.get(cut, 0) for cut in CUTS)),
        ("all", "Faults in all", "faults", "higher", sum(faults.values())),
        ("lost", "Jobs lost", "jobs", "lower", found["lost"]),
        ("twice", "Jobs completed twice", "jobs", "lower", found["completed_twice"]),
        ("healed", "Until all had ended, once healed", "s", "lower", found["healed_seconds"]),
    )
    return Section(
        "faults",
        "Faults",
        METHOD.format(seconds=seconds),
        [
            Measurement(
                f"faults-{name}",
                what,
                unit,
                "higher" if better == "higher" else "lower",
                {"pgscribe": [figure]},
                headline=name == "lost",
            )
            for name, what, unit, better, figure in lines
        ],
    )
