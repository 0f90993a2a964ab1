"""What goes on right now: workers, the queue, webhooks, the web server."""

from urllib.parse import urlsplit

import httpx2

from jobs import __version__
from jobs.doctor.checks import Context, Finding, fail, ok, skipped, together, warn
from jobs.doctor.database import Row, connected, one
from jobs.doctor.network import is_near
from jobs.settings import ServerAddress
from jobs.sql import DOCTOR

LATE = 900.0  # seconds that the oldest job has waited while there are workers
LATE_WEBHOOK = 600.0  # seconds that a delivery has waited that may be sent
MOST_COUNTED = 10_000


async def _queue(context: Context) -> Row:
    async with connected(context) as conn:
        return await one(conn, DOCTOR["queue"], stall_timeout=context.settings.stall_timeout)


async def check_workers(context: Context) -> Finding:
    """See whether anybody is there to take jobs, and whether a dead one still holds some."""
    queue = await _queue(context)
    if not queue["alive"]:
        last = queue["last_seen"]
        heard = "none was ever heard of" if last is None else f"the last one {_ago(last)}"
        if queue["waiting"] or queue["running"]:
            return fail(
                f"no worker is alive ({heard}) while {_count(queue['waiting'])} jobs wait and "
                f"{queue['running']} are in processing",
                "Start one with `pgscribe worker`; if some run, their logs say why they are not "
                "heard of. Their database is the one of PGSCRIBE_DATABASE_URL.",
            )
        return warn(f"no worker is alive ({heard})", "Start one with `pgscribe worker`.")
    if queue["orphaned"]:
        return warn(
            f"{queue['orphaned']} jobs are held by workers that have not been heard of for twice "
            "the stall timeout",
            "Workers give them back by themselves within PGSCRIBE_STALL_TIMEOUT; if this stays, "
            "see their logs.",
        )
    async with connected(context) as conn:
        others = {*(await one(conn, DOCTOR["versions"]))["running"]} - {__version__}
    if others:
        return warn(
            f"{queue['alive']} alive; workers or web servers of {', '.join(sorted(others))} run "
            f"beside this pgscribe {__version__}",
            "Replace them, unless an upgrade is under way: docs/upgrading.md.",
        )
    return ok(f"{queue['alive']} alive, {queue['running']} jobs in processing")


async def check_queue(context: Context) -> Finding:
    """See whether jobs may start, and whether they do so in time."""
    queue = await _queue(context)
    problems = []
    if queue["paused"]:
        names = [paused.split()[0] for paused in queue["paused"]]
        problems.append(
            warn(
                f"paused: {', '.join(queue['paused'])}; {_count(queue['waiting'])} jobs wait",
                " ".join(f"pgscribe resume --queue {name}" for name in names),
            )
        )
    elif queue["alive"] and (queue["oldest"] or 0) > LATE:
        problems.append(
            warn(
                f"{_count(queue['waiting'])} jobs wait, the oldest {_for(queue['oldest'])}",
                "Start more workers or raise PGSCRIBE_WORKER_CONCURRENCY, unless the oldest is of "
                "an owner who is paused or at max_running; docs/runbook.md says where to look.",
            )
        )
    if queue["stranded"]:
        problems.append(
            fail(
                f"{_count(queue['stranded'])} jobs have no queue job and never start, as a trigger "
                "was disabled while they were inserted",
                "Delete them, or have them inserted again; docs/runbook.md finds them.",
            )
        )
    owners = f"; {queue['paused_owners']} owners are paused" if queue["paused_owners"] else ""
    waits = "nothing waits"
    if queue["waiting"]:
        waits = f"{_count(queue['waiting'])} jobs wait, the oldest {_for(queue['oldest'])}"
    return together(problems, ok(waits + owners))


async def check_webhooks(context: Context) -> Finding:
    """See whether deliveries go out, and whether endpoints were given up."""
    async with connected(context) as conn:
        webhooks = await one(conn, DOCTOR["webhooks"])
    problems = []
    if webhooks["ready"] and (webhooks["oldest"] or 0) > LATE_WEBHOOK:
        problems.append(
            fail(
                f"{_count(webhooks['ready'])} deliveries wait to be sent, the oldest "
                f"{_for(webhooks['oldest'])}",
                "See whether workers are alive, whether `pgscribe resume --queue webhooks` is "
                "needed, and whether PGSCRIBE_WORKER_LIGHT_SLOTS is too low.",
            )
        )
    if webhooks["disabled"]:
        problems.append(
            warn(
                f"{webhooks['disabled']} of {webhooks['endpoints']} endpoints were disabled, as "
                "they answered 410 or nothing came through",
                "`pgscribe webhooks endpoints` names them, `pgscribe webhooks deliveries --status "
                "failed` says why; then `pgscribe webhooks enable` and `replay`.",
            )
        )
    again = ""
    if webhooks["again"]:
        again = (
            f"; {_count(webhooks['again'])} did not arrive and are tried again later: "
            "`pgscribe webhooks deliveries --status queued`"
        )
    seen = f"{webhooks['endpoints']} endpoints, {_count(webhooks['ready'])} deliveries wait"
    return together(problems, ok(seen + again))


async def check_web(context: Context) -> Finding:
    """Ask the web server how it is, if it is known where it is."""
    del context
    address = ServerAddress.load()
    url = address.url.rstrip("/")
    try:
        near = is_near(urlsplit(url).hostname or "")  # no proxy is asked for what is here
        async with httpx2.AsyncClient(timeout=5.0, trust_env=not near) as client:
            answer = await client.get(f"{url}/readyz")
            if answer.status_code == httpx2.codes.NOT_FOUND:  # of a version before it
                answer = await client.get(f"{url}/healthz")
    except httpx2.HTTPError as exc:
        if "url" not in address.model_fields_set:
            return skipped("PGSCRIBE_URL is not set, and nobody answers at its default")
        return fail(
            f"{url} does not answer ({type(exc).__name__})",
            "Start it with `pgscribe web`, or correct PGSCRIBE_URL.",
        )
    if answer.is_success:
        return ok(f"{url} is ready")
    if answer.status_code == httpx2.codes.NOT_FOUND and "url" not in address.model_fields_set:
        return skipped("PGSCRIBE_URL is not set, and something else answers at its default")
    return fail(
        f"{url} answers HTTP {answer.status_code}",
        "Its log says why; 503 means that it cannot reach what it needs, 502 and 504 that a proxy "
        "cannot reach it.",
    )


def _count(number: int) -> str:
    return f"more than {MOST_COUNTED}" if number > MOST_COUNTED else str(number)


def _ago(seconds: float) -> str:
    return f"{_for(seconds, '')} ago".strip()


def _for(seconds: float, word: str = "for ") -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{word}{seconds / size:.0f} {unit}"
    return f"{word}{seconds:.0f} s"
