"""What is in the database: migrations, and whether somebody has changed what they made."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

from db import migrate, schema
from jobs.doctor.checks import Context, Finding, fail, ok, skipped, together, warn
from jobs.doctor.database import connected, one
from jobs.sql import DOCTOR

MOST_NAMED = 5  # things that are named in one sentence

Lines = dict[str, list[schema.Line]]  # by kind


async def check_migrations(context: Context) -> Finding:
    """Compare the ledger with what this version of pgscribe brings."""
    ours = {migration.version: migration for migration in migrate.migrations()}
    async with connected(context) as conn:
        if not (await one(conn, DOCTOR["ledger_exists"]))["there"]:
            return fail(
                "the database has not been migrated",
                "Run `pgscribe migrate`, or `pgscribe migrate --export supabase/migrations` and "
                "`supabase db push`.",
            )
        rows = await (await conn.execute(DOCTOR["ledger"], {"known": [*ours]})).fetchall()
    applied = {row["version"] for row in rows}
    missing = [migration for version, migration in ours.items() if version not in applied]
    newer = [f"{row['version']}_{row['name']}" for row in rows if not row["known"]]
    changed = [
        ours[row["version"]].filename
        for row in rows
        if row["known"] and row["checksum"] not in {None, _checksum(ours[row["version"]])}
    ]
    return together(
        _ledger_problems(missing, newer, changed),
        ok(f"all {len(ours)} are applied; the newest is {max(ours.values()).filename}"),
    )


def _checksum(migration: migrate.Migration) -> str:
    return hashlib.md5(migration.sql.rstrip("; \r\n").encode(), usedforsecurity=False).hexdigest()


def _ledger_problems(
    missing: list[migrate.Migration], newer: list[str], changed: list[str]
) -> Iterator[Finding]:
    if missing:
        queue = sum(migration.name.startswith("procrastinate_") for migration in missing)
        of_queue = f" ({queue} of them procrastinate's)" if queue else ""
        yield fail(
            f"{len(missing)} migrations are missing{of_queue}: "
            + _some(migration.filename for migration in missing),
            "Run `pgscribe migrate`, before newer workers and web servers start.",
        )
    if newer:
        yield warn(
            f"the database has migrations that this pgscribe does not know: {_some(newer)}",
            "Upgrade this machine's pgscribe to the version that has migrated the database.",
        )
    if changed:
        yield warn(
            f"migrations were applied with another text than they have here: {_some(changed)}",
            "If this is not a modified pgscribe, compare supabase_migrations.schema_migrations "
            "with `pgscribe migrate --export`.",
        )


def _some(names: Iterable[str]) -> str:
    found = [*names]
    more = len(found) - MOST_NAMED
    return ", ".join(found[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


async def check_schema(context: Context) -> Finding:
    """Compare tables, triggers, policies, functions and grants with what the migrations made."""
    async with connected(context) as conn:
        async with conn.transaction():
            await conn.execute(schema.NAMES_IN_FULL)
            rows = await (await conn.execute(schema.QUERY)).fetchall()
        known = {"known": [migration.version for migration in migrate.migrations()]}
        ledger = await (await conn.execute(DOCTOR["ledger"], known)).fetchall()
    if any(not row["known"] for row in ledger):
        return skipped("the database is of a newer pgscribe, of which this one knows too little")
    expected = schema.expected()
    found = schema.found([(row["kind"], row["object"], row["detail"]) for row in rows])
    return together(
        _differences(expected - found, found - expected),
        ok(f"{len(expected)} things are as the migrations made them"),
    )


def _differences(missing: set[schema.Line], extra: set[schema.Line]) -> Iterator[Finding]:
    new = _by_kind(extra)
    there = {line.object for line in new["rls"]}
    dropped = {line.object for line in missing if line.kind == "rls"} - there
    gone = _by_kind(line for line in missing if line.object not in dropped)
    if dropped:
        yield fail(
            f"tables are gone: {_some(sorted(dropped))}", "Restore them: docs/backup.md says how."
        )
    if open_to_all := [line for line in new["rls"] if line.detail == "off"]:
        yield fail(
            f"row level security is off on {_objects(open_to_all)}: users see others' rows",
            _each(open_to_all, "alter table {} enable row level security"),
        )
    if gone["trigger"]:
        yield fail(
            "triggers are disabled or gone: "
            + _some(f"{_name(line)} on {line.object}" for line in gone["trigger"]),
            "Jobs are not queued, mirrored or guarded without them. "
            + _each(gone["trigger"], "alter table {} enable trigger {name}")
            + " Where one is gone, run its `create trigger` of db/migrations again.",
        )
    yield from _rights(new, gone)
    if gone["index"]:
        yield warn(
            "indexes are invalid or gone: " + _some(_name(line) for line in gone["index"]),
            "Queries get slow without them. An invalid one: reindex index concurrently <name>; "
            "one that is gone: its `create index` of db/migrations.",
        )
    if gone["constraint"]:
        yield fail(
            "constraints are gone or not valid: "
            + _some(f"{_name(line)} on {line.object}" for line in gone["constraint"]),
            _each(gone["constraint"], "alter table {} validate constraint {name}")
            + " Where one is gone, add it again as db/migrations does.",
        )
    if gone["realtime"]:
        yield warn(
            f"Supabase Realtime says nothing of changes to {_objects(gone['realtime'])}",
            _each(gone["realtime"], "alter publication supabase_realtime add table {}"),
        )
    if gone["function"]:
        yield fail(
            f"functions are not as the migrations made them: {_objects(gone['function'])}",
            "Somebody has changed or dropped them; run their `create function` of db/migrations "
            "again, as `create or replace`.",
        )


def _rights(new: Lines, gone: Lines) -> Iterator[Finding]:
    """Say what users may do that they might not, and the other way round."""
    names = [{(line.object, _name(line)) for line in kind["policy"]} for kind in (new, gone)]
    changed = names[0] & names[1]
    added, withdrawn = (
        [line for line in kind["policy"] if (line.object, _name(line)) not in changed]
        for kind in (new, gone)
    )
    if changed:
        yield fail(
            "policies are not as the migrations made them: "
            + _some(f"{name} on {table}" for table, name in sorted(changed)),
            "Somebody has changed them: drop each one, and run its `create policy` of "
            "db/migrations again.",
        )
    if gone["view"]:
        yield fail(
            f"views are gone, or show others' rows: {_objects(gone['view'])}",
            _each(gone["view"], "alter view {} set (security_invoker = true)")
            + " Where one is gone, run its `create view` of db/migrations again.",
        )
    widened = [line for line in new["grant"] if not line.detail.startswith("service_role")]
    allowing = [line for line in added if ": permissive " in line.detail]
    if widened or allowing:
        yield fail(
            f"more is allowed than was: {_some(map(_right, [*widened, *allowing]))}",
            "Unless you meant it, take it back: "
            + " ".join([*map(_revoke, widened), *map(_drop_policy, allowing)]),
        )
    if restricting := [line for line in added if line not in allowing]:
        yield warn(
            f"policies restrict what users see: {_some(map(_right, restricting))}",
            "Unless you meant it, take it back: " + " ".join(map(_drop_policy, restricting)),
        )
    if withdrawn := gone["grant"] + withdrawn:
        yield fail(
            f"less is allowed than was: {_some(map(_right, withdrawn))}",
            "Grant it again, as db/migrations does; clients get 42501 or see nothing.",
        )


def _by_kind(lines: Iterable[schema.Line]) -> Lines:
    kinds: Lines = defaultdict(list)
    for line in sorted(lines):
        kinds[line.kind].append(line)
    return kinds


def _right(line: schema.Line) -> str:
    return f"{line.object} {line.detail.partition(' by ')[0]}"


def _objects(lines: list[schema.Line]) -> str:
    return _some(dict.fromkeys(line.object for line in lines))


def _name(line: schema.Line) -> str:
    return line.detail.partition(":")[0]


def _each(lines: list[schema.Line], statement: str) -> str:
    """Return a statement for each, to be pasted."""
    made = [statement.format(line.object, name=_name(line)) for line in lines[:MOST_NAMED]]
    return " ".join(f"{text};" for text in made)


def _revoke(line: schema.Line) -> str:
    role, _, privilege = line.detail.partition(": ")
    if line.object.endswith(")"):
        return f"revoke {privilege} on function {line.object} from {role};"
    if line.object.startswith("schema "):
        return f"revoke {privilege} on {line.object} from {role};"
    table, _, column = line.object.rpartition(".")
    if "." in table:
        return f"revoke {privilege} ({column}) on {table} from {role};"
    return f"revoke {privilege} on {line.object} from {role};"


def _drop_policy(line: schema.Line) -> str:
    return f'drop policy "{_name(line)}" on {line.object};'
