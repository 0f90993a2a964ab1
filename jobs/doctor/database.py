"""The database: reached, as whom, with which limits, through which pooler, at what time."""

import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row

from jobs.database import deadline
from jobs.doctor.checks import Context, Finding, fail, ok, together, warn
from jobs.doctor.network import Unreachable, is_near, reach
from jobs.sql import DOCTOR

LIMIT = 10.0  # seconds for one connection and all that is asked on it
OLDEST = 150000  # Postgres 15
SHORTEST_STATEMENT = 10.0  # seconds; maintenance takes as long
LONG_TRANSACTION = 900.0  # seconds
MOST_WAL = 2**30  # bytes that a replication slot may keep while nobody reads from it
LISTEN_TIMEOUT = 3.0  # seconds for a notification to arrive
ROUNDS = 5  # questions for the time, of which the quickest counts
SKEW_WARNS, SKEW_FAILS = 5.0, 60.0  # seconds
TRANSACTION_PORT = 6543  # of Supabase's pooler

Row = dict[str, Any]
Connection = psycopg.AsyncConnection[Row]

# What the server says while connecting, and what it means. libpq gives no code for these.
_REFUSALS = (
    (
        ("password authentication failed", "no password supplied", "SASL authentication failed"),
        "the server refuses user or password",
        (
            "Correct PGSCRIBE_DATABASE_URL: Supabase shows the user under Connect, and sets a new "
            "password under Database > Settings. Write special characters in it as %XX."
        ),
    ),
    (
        ("Tenant or user not found", "tenant/user"),
        "the pooler does not know this user",
        (
            "Correct PGSCRIBE_DATABASE_URL: at Supabase's pooler the user is "
            "postgres.<project ref>, and the host has the project's region."
        ),
    ),
    (
        ("no pg_hba.conf entry",),
        "the server admits nobody from here as this user",
        "Allow this machine's address (Supabase: Database > Settings > Network Restrictions).",
    ),
    (
        ("SSL", "certificate", "TLS"),
        "no encrypted connection comes about",
        (
            "See sslmode and sslrootcert in PGSCRIBE_DATABASE_URL; Supabase's certificate is under "
            "Database > Settings > SSL Configuration."
        ),
    ),
    (
        ("does not exist",),
        "the server is there, but not this database or role",
        (
            "Correct the database's name at the end of PGSCRIBE_DATABASE_URL, which is `postgres` "
            "at Supabase, and the user in it."
        ),
    ),
    (
        ("too many clients", "remaining connection slots", "max clients", "MaxClientsInSession"),
        "the server has no connection left",
        "Lower PGSCRIBE_DATABASE_POOL_SIZE or run fewer processes, or let the server have more.",
    ),
    (
        ("starting up", "shutting down", "recovery mode"),
        "the server is starting or stopping",
        "Wait some seconds and run this again.",
    ),
    (
        ("No such file or directory", "Connection refused"),
        "no server listens there",
        "Start it, or give a host in PGSCRIBE_DATABASE_URL: postgresql://user:password@host/name.",
    ),
)


@asynccontextmanager
async def connected(context: Context) -> AsyncIterator[Connection]:
    """Open a connection of a check's own, which ends whatever is asked on it in time."""
    options: dict[str, Any] = {"hostaddr": context.address} if context.address else {}
    conn = await psycopg.AsyncConnection.connect(
        context.settings.database_url.get_secret_value(),
        autocommit=True,
        row_factory=dict_row,
        **{
            "prepare_threshold": None,
            "connect_timeout": int(LIMIT),
            "application_name": "pgscribe doctor",
            **options,
        },
    )
    async with conn:
        with deadline(conn, LIMIT):
            yield conn


async def one(conn: Connection, query: bytes, **values: object) -> Row:
    """Return the one row of a query."""
    row = await (await conn.execute(query, values)).fetchone()
    assert row is not None
    return row


async def check_database(context: Context) -> Finding:
    """Reach the server step by step; each step that may fail has its own sentence."""
    parameters = _parameters(context.settings.database_url.get_secret_value())
    if isinstance(parameters, Finding):
        return parameters
    hosts = str(parameters.get("host") or os.environ.get("PGHOST") or "").split(",")
    port = str(parameters.get("port") or os.environ.get("PGPORT") or "5432").split(",")[0]
    if len(hosts) == 1 and hosts[0] and not hosts[0].startswith("/") and port.isdigit():
        try:
            address = await reach(hosts[0], int(port), name="PGSCRIBE_DATABASE_URL")
        except Unreachable as exc:
            return exc.finding
        context.address = None if "hostaddr" in parameters else address
    try:
        async with connected(context) as conn:
            server = await one(conn, DOCTOR["server"])
    except psycopg.OperationalError as exc:
        return _refusal(" ".join(str(exc).split()))
    if server["number"] < OLDEST:
        return fail(
            f"Postgres {server['version']} is older than 15, the first that pgscribe works with",
            "Upgrade the server.",
        )
    if server["standby"]:
        return fail(
            "this server is a read-only standby", "Point PGSCRIBE_DATABASE_URL at the primary."
        )
    return ok(f"Postgres {server['version']}, database {server['name']}, as {server['role']}")


def _parameters(url: str) -> dict[str, Any] | Finding:
    if not url.strip():
        return fail("PGSCRIBE_DATABASE_URL is empty", "Set it in the environment or in .env.")
    try:
        parameters: dict[str, Any] = conninfo_to_dict(url)
    except psycopg.Error:
        return fail(
            "PGSCRIBE_DATABASE_URL is no URL of a database",
            "Give it as postgresql://user:password@host:5432/database; write special characters "
            "in the password as %XX.",
        )
    if any("@" in str(parameters.get(part, ""))[1:] for part in ("host", "dbname")):
        return fail(  # with nothing of these parts, which are some of the password
            "PGSCRIBE_DATABASE_URL is not understood: its password has an @ or a / as it is",
            "Write special characters in the password as %XX: @ as %40, / as %2F, : as %3A.",
        )
    return parameters


def _refusal(message: str) -> Finding:
    for words, seen, mend in _REFUSALS:
        if any(word in message for word in words):
            return fail(f"{seen} ({message})", mend)
    return fail(
        f"the server was reached, but it gave no connection ({message})",
        "See the server's log, and whether it is a Postgres server that listens there.",
    )


async def check_role(context: Context) -> Finding:
    """See whether the connection's role may do what pgscribe does."""
    async with connected(context) as conn:
        missing = (await one(conn, DOCTOR["missing_roles"]))["missing"]
        if missing:
            return fail(
                f"the database has no role {', '.join(missing)}: it is not a Supabase project's",
                "Use the database of a Supabase project, or `pgscribe dev`, which makes one.",
            )
        server = await one(conn, DOCTOR["server"])
        refused = [name for name in ("authenticated", "service_role") if not await _may(conn, name)]
        owner = await (await conn.execute(DOCTOR["owns_jobs"])).fetchone()
    problems = []
    if refused:
        problems.append(
            fail(
                f"{server['role']} may not act as {' or '.join(refused)}",
                "Connect as `postgres`, or grant it these roles: the API acts as its users.",
            )
        )
    if not (server["bypasses"] or server["superuser"] or (owner and owner["owns"])):
        problems.append(
            fail(
                f"{server['role']} is under row level security: workers see nobody's jobs",
                "Connect as `postgres`, which owns the tables.",
            )
        )
    return together(problems, ok(f"{server['role']} may act as users, and sees all jobs"))


async def _may(conn: Connection, role: str) -> bool:
    try:
        async with conn.transaction():
            await conn.execute(DOCTOR["act_as"], {"role": role})
    except psycopg.errors.InsufficientPrivilege:
        return False
    return True


async def check_encryption(context: Context) -> Finding:
    """See whether what passes between here and a database elsewhere can be read on the way."""
    async with connected(context) as conn:
        encrypted, host, address = conn.pgconn.ssl_in_use, conn.info.host, conn.info.hostaddr
    if encrypted:
        mode = conninfo_to_dict(context.settings.database_url.get_secret_value()).get("sslmode")
        checked = "checked" if mode in {"verify-ca", "verify-full"} else "not checked"
        return ok(f"TLS; the server's certificate is {checked}")
    if is_near(host, address):
        return ok("not encrypted, and does not leave this machine or its containers' network")
    return warn(
        f"what passes to {host} is not encrypted: password, transcripts and all",
        "Add ?sslmode=require to PGSCRIBE_DATABASE_URL, or sslmode=verify-full with sslrootcert.",
    )


async def check_capacity(context: Context) -> Finding:
    """Compare what the processes may take with what the server has, in connections and time."""
    async with connected(context) as conn:
        server = await one(conn, DOCTOR["server"])
    each = context.settings.database_pool_size + 1
    processes = max(1, server["workers"]) + 1
    need, have = processes * each, server["connections"]
    problems = []
    if need > have:
        problems.append(
            warn(
                f"{processes} processes may open {need} connections; the server has {have}",
                "Lower PGSCRIBE_DATABASE_POOL_SIZE, run fewer processes, or raise max_connections.",
            )
        )
    elif server["used"] > 0.9 * have:
        problems.append(
            warn(
                f"{server['used']} of the server's {have} connections are in use",
                "See who has them: select application_name, count(*) from pg_stat_activity "
                "group by 1.",
            )
        )
    if 0 < server["statement_seconds"] < SHORTEST_STATEMENT:
        problems.append(
            warn(
                f"statement_timeout is {server['statement_timeout']}: maintenance may be cut off",
                f"alter role {server['role']} set statement_timeout = '2min'",
            )
        )
    return together(
        problems,
        ok(
            f"{need} of {have} connections for {processes} processes; statement_timeout "
            f"{server['statement_timeout']}"
        ),
    )


async def check_transactions(context: Context) -> Finding:
    """Look for what keeps Postgres from removing dead rows, of which a queue makes many, or WAL."""
    async with connected(context) as conn:
        transactions = await one(conn, DOCTOR["transactions"], longest=LONG_TRANSACTION)
        slots = await (await conn.execute(DOCTOR["slots"], {"most": MOST_WAL})).fetchall()
    problems = []
    if transactions["long"]:
        problems.append(
            warn(
                f"a transaction is open for {transactions['oldest'] / 60:.0f} minutes: "
                f"{', '.join(transactions['long'])}",
                "While it is, dead rows stay and claims get slower. Let whoever opened it end it, "
                "or: select pg_terminate_backend(process); then see "
                "idle_in_transaction_session_timeout.",
            )
        )
    problems += [
        warn(
            f"nobody reads from replication slot {slot['name']}, which keeps {slot['size']} of WAL",
            "It grows until the disk is full. If nobody comes back for it: "
            f"select pg_drop_replication_slot('{slot['name']}').",
        )
        for slot in slots
    ]
    oldest = transactions["oldest"]
    return together(
        problems, ok("none is open" if oldest is None else f"the oldest is {oldest:.0f} s old")
    )


async def check_pooler(context: Context) -> Finding:
    """Listen on one connection and notify on another: a pooler in transaction mode loses it."""
    channel = f"pgscribe_doctor_{secrets.token_hex(8)}"
    async with connected(context) as listening, connected(context) as other:
        await listening.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        await other.execute(DOCTOR["notify"], {"channel": channel})
        begun = time.monotonic()
        heard = [
            notification
            async for notification in listening.notifies(timeout=LISTEN_TIMEOUT, stop_after=1)
        ]
        seconds = time.monotonic() - begun
        await listening.execute(sql.SQL("unlisten {}").format(sql.Identifier(channel)))
        prepared = await _keeps_prepared(listening, other)
        port = other.info.port
    if heard:
        return ok(f"a notification arrived after {seconds * 1000:.0f} ms")
    hint = f" (port {port} is Supabase's transaction pooler)" if port == TRANSACTION_PORT else ""
    lost = "" if prepared else ", and prepared statements are lost as well"
    return warn(
        f"LISTEN does not work through this connection{hint}{lost}: a pooler in transaction mode; "
        "jobs start up to 2 s late and events come by polling",
        "Use the direct connection or the session pooler (port 5432) in PGSCRIBE_DATABASE_URL.",
    )


async def _keeps_prepared(*connections: Connection) -> bool:
    """Return whether what one connection has prepared is still there the next time."""
    for conn in connections:
        conn.prepare_threshold = 0
    try:
        for _ in range(2):
            for conn in connections:
                await conn.execute(DOCTOR["backend"], prepare=True)
    except psycopg.Error:
        return False
    return True


async def check_clock(context: Context) -> Finding:
    """Compare this machine's clock with the database's, and with that of who issues tokens."""
    async with connected(context) as conn:
        skew, trip = min([await _skew(conn) for _ in range(ROUNDS)], key=lambda pair: pair[1])
    differences = [("the database's", skew, trip / 2)]
    url = context.settings.signing_keys_url
    if url and (said := await _date(url)) is not None:
        differences.append((f"{httpx2.URL(url).host}'s", said, 1.0))
    seen = ", ".join(
        f"{abs(by):.1f} s {'behind' if by > 0 else 'ahead of'} {whose}"
        if abs(by) > precision
        else f"as {whose}, to {max(precision, 0.001):.3f} s"
        for whose, by, precision in differences
    )
    most = max(max(0.0, abs(by) - precision) for _, by, precision in differences)
    mend = "Let this machine's clock be set by NTP (timedatectl set-ntp true)."
    if most >= SKEW_FAILS:
        return fail(f"this machine's clock is {seen}: valid tokens and links are refused", mend)
    if most >= SKEW_WARNS:
        return warn(f"this machine's clock is {seen}", mend)
    return ok(f"this machine's clock is {seen}")


async def _skew(conn: Connection) -> tuple[float, float]:
    """Return by how much the database is ahead, and how long the question took, in seconds."""
    begun, at = time.monotonic(), time.time()
    (there,) = (await one(conn, DOCTOR["now"])).values()
    trip = time.monotonic() - begun
    return float(there) - (at + trip / 2), trip


async def _date(url: str) -> float | None:
    """Return by how much the clock of a web server is ahead, if it says what time it is."""
    try:
        async with httpx2.AsyncClient(timeout=5.0) as client:
            answer = await client.get(url)
        ahead = parsedate_to_datetime(answer.headers["date"]).timestamp() + 0.5 - time.time()
        age = float(answer.headers.get("age", 0))
    except (httpx2.HTTPError, KeyError, ValueError, TypeError):
        return None
    # Caches say the time either of then or of now.
    return ahead if ahead > 0 else min(0.0, ahead + age)
