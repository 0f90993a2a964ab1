"""Runs checks: those that do not need each other at the same time, each for so long at most."""

import asyncio
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from jobs import __version__
from jobs.doctor.checks import Check, Context, Finding, Status, fail, skipped, worst
from jobs.settings import Settings

FORMAT = 1  # of the report as JSON; it changes when a field changes its meaning or goes
SHORTEST_SECRET = 4  # characters; a shorter one is part of too many words
# What is secret and is read by others than `Settings`: libpq, Modal's client, `pgscribe`'s client.
VARIABLES = ("PGPASSWORD", "MODAL_TOKEN_SECRET", "PGSCRIBE_TOKEN")
_USER_IN_URL = re.compile(r"(?<=://)[^\s/@]+(?=@)")  # of a proxy, say


@dataclass(frozen=True, slots=True)
class Result:
    """A check and what came of it. ``seconds``: how long it took."""

    id: str
    title: str
    status: Status
    seen: str
    mend: str | None
    seconds: float


def wanted(checks: Sequence[Check], only: Collection[str], skip: Collection[str]) -> list[Check]:
    """Return the checks to run: ``only`` those and what they need, without those to ``skip``."""
    by_id = {check.id: check for check in checks}
    chosen = set(only) or set(by_id)
    waiting = list(chosen)
    while waiting:
        new = set(by_id[waiting.pop()].needs) - chosen
        chosen |= new
        waiting += new
    return [check for check in checks if check.id in chosen and check.id not in skip]


async def examine(
    checks: Iterable[Check], context: Context, on_result: Callable[[Result], None]
) -> list[Result]:
    """Run checks and return what came of them, in their order. None raises, none hangs."""
    running: dict[str, asyncio.Task[Result]] = {}
    for check in checks:  # what a check needs comes before it
        running[check.id] = asyncio.create_task(_run(check, context, dict(running)))
    results = []
    for task in running.values():
        result = await task
        results.append(result)
        on_result(result)
    return results


async def _run(
    check: Check, context: Context, before: Mapping[str, asyncio.Task[Result]]
) -> Result:
    for need in check.needs:
        if need in before and (await before[need]).status in {"fail", "skipped"}:
            return _result(check, skipped(f"needs what `{need}` looks at"), 0.0, context)
    begun = time.monotonic()
    task = asyncio.ensure_future(check.run(context))
    await asyncio.wait([task], timeout=check.limit)
    seconds = time.monotonic() - begun
    if not task.done():
        task.cancel()
        finding = fail(
            f"no answer within {check.limit:g} s",
            "See whether a firewall swallows packets on the way, or the machine is overloaded.",
        )
    elif (problem := task.exception()) is not None:
        finding = _unforeseen(problem)
    else:
        finding = task.result()
    return _result(check, finding, seconds, context)


def _unforeseen(problem: BaseException) -> Finding:
    text = " ".join(str(problem).split()) or "no message"
    if isinstance(problem, psycopg.errors.InsufficientPrivilege):
        return fail(
            f"the database's role may not do what pgscribe does: {text}",
            "Connect as `postgres` in PGSCRIBE_DATABASE_URL.",
        )
    if isinstance(problem, psycopg.OperationalError):
        return fail(
            f"the database broke off or did not answer: {text}",
            "See what `database` says, and the server's log; then run this again.",
        )
    return fail(
        f"{type(problem).__name__}: {text}",
        "The check itself failed; what it says may tell why. If not, please report it.",
    )


def _result(check: Check, finding: Finding, seconds: float, context: Context) -> Result:
    secrets = _secrets(context)
    return Result(
        check.id,
        check.title,
        finding.status,
        _without(finding.seen, secrets),
        finding.mend and _without(finding.mend, secrets),
        round(seconds, 3),
    )


def _secrets(context: Context) -> set[str]:
    """Return all that must not be shown, also as URLs write it."""
    values = {os.environ.get(name, "") for name in VARIABLES}
    if context.loaded is not None:
        values |= _secret_settings(context.loaded)
    values |= {unquote(value) for value in values}
    return {value for value in values if len(value) >= SHORTEST_SECRET}


def _secret_settings(settings: Settings) -> set[str]:
    values = {
        value.get_secret_value()
        for value in dict(settings).values()
        if isinstance(value, SecretStr)
    }
    url = settings.database_url.get_secret_value()
    try:
        values.add(str(conninfo_to_dict(url).get("password") or ""))
        values.add(urlsplit(url).password or "")
    except Exception:  # noqa: BLE001, S110 - then it is no URL, and is hidden as a whole
        pass
    return values


def _without(text: str, secrets: set[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _USER_IN_URL.sub("***", text)


def report(results: Sequence[Result]) -> dict[str, Any]:
    """Return the results as ``--json`` prints them; docs/doctor.md says what is in it."""
    return {
        "format": FORMAT,
        "version": __version__,
        "status": worst(result.status for result in results),
        "checks": [asdict(result) for result in results],
    }


def succeeded(results: Iterable[Result], *, strict: bool) -> bool:
    """Return whether nothing has failed; ``strict``: and there is no warning."""
    bad = {"fail", "warn"} if strict else {"fail"}
    return not any(result.status in bad for result in results)
