"""What a migration may do while workers of the version before run: docs/upgrading.md."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
RELEASED = "20261126082000"  # the newest migration that databases have, which stay as they are
SQUAWK = shutil.which("squawk") or shutil.which("squawk", path=str(Path(sys.executable).parent))
NEW = [
    path
    for path in sorted((REPO / "db" / "migrations").glob("*.sql"))
    if path.name.partition("_")[0] > RELEASED
]
IGNORE = "-- squawk-ignore"

pytestmark = pytest.mark.skipif(SQUAWK is None, reason="needs squawk (PyPI: squawk-cli)")


def findings(paths: Iterable[Path]) -> list[str]:
    """Return the rules that files break, each with its place."""
    assert SQUAWK is not None
    command = [SQUAWK, "--config", str(REPO / ".squawk.toml"), "--reporter", "json"]
    done = subprocess.run(
        [*command, *map(str, paths)], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    return [
        f"{Path(found['file']).name}:{found['line'] + 1}: {found['rule_name']}"
        for found in json.loads(done.stdout)
    ]


def test_new_migrations_break_nobody_who_runs() -> None:
    harmless = REPO / "db" / "migrations" / "20261126070000_look_at_cancellation.sql"
    assert findings([harmless, *NEW]) == []


def unexplained(sql: str) -> list[str]:
    """Return the exceptions that no comment above explains."""
    lines = sql.splitlines()
    return [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if line.lstrip().startswith(IGNORE)
        and (not before.lstrip().startswith("-- ") or before.lstrip().startswith(IGNORE))
    ]


def test_exceptions_say_why() -> None:
    assert unexplained(f"-- It is empty.\n{IGNORE} ban-drop-table\ndrop table x;") == []
    assert unexplained(f"\n{IGNORE} ban-drop-table\ndrop table x;") == [f"{IGNORE} ban-drop-table"]
    for path in NEW:
        assert unexplained(path.read_text(encoding="utf-8")) == [], path.name


FORBIDDEN = {
    "alter table public.processing_jobs drop column note;": "ban-drop-column",
    "alter table public.processing_jobs rename column note to remark;": "renaming-column",
    "alter table public.processing_jobs alter column note type varchar(9);": "changing-column-type",
    "alter table public.processing_jobs add column x integer not null;": ("adding-required-field"),
    "alter table public.processing_jobs add constraint c check (attempt > 0);": (
        "constraint-missing-not-valid"
    ),
    "create index i on public.processing_jobs (note);": "require-concurrent-index-creation",
    "drop function pgscribe.turn;": "ban-drop-function",
    "drop table public.webhook_attempts;": "ban-drop-table",
    "alter table public.processing_jobs rename to jobs;": "renaming-table",
}


def test_what_breaks_them_is_found(tmp_path: Path) -> None:
    paths = {tmp_path / f"{number:02}.sql": rule for number, rule in enumerate(FORBIDDEN.values())}
    for path, statement in zip(paths, FORBIDDEN, strict=True):
        path.write_text(f"{statement}\n")
    found = findings(paths)
    for path, rule in paths.items():
        assert f"{path.name}:1: {rule}" in found
    lock = "-- It is empty.\n-- squawk-ignore require-concurrent-index-creation\n"
    ignored = tmp_path / "ignored.sql"
    ignored.write_text(f"{lock}create index i on public.processing_jobs (note);\n")
    assert findings([ignored]) == []
