"""What the commands of ``pgscribe`` have in common. Nothing heavy is imported with it."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

from jobs.errors import PgscribeError

if TYPE_CHECKING:
    import psycopg

T = TypeVar("T")

CONNECT_TIMEOUT = 10  # seconds; libpq waits for ever

# SQLSTATEs: there is no such schema, column, function or table.
_NOT_MIGRATED = frozenset(["3F000", "42703", "42883", "42P01"])

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Show known errors as one plain message, without a stack."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PgscribeError as exc:
            raise click.ClickException(str(exc)) from exc
        except Exception as exc:
            if (said := _of_database(exc)) is None:
                raise
            raise click.ClickException(said) from exc

    return wrapped


def _of_database(exc: Exception) -> str | None:
    """Return what an error of the database means for whoever runs a command."""
    psycopg = sys.modules.get("psycopg")  # imported only by what uses the database
    if psycopg is None or not isinstance(exc, psycopg.Error):
        return None
    if isinstance(exc, psycopg.OperationalError):
        return f"The database is out of reach: {exc}"
    if isinstance(exc, psycopg.ProgrammingError) and exc.sqlstate is None:  # of what it connects to
        return (
            "PGSCRIBE_DATABASE_URL: can't be read; it must begin with postgresql://, or be pairs "
            "such as host=… dbname=…"
        )
    said = exc.diag.message_primary
    if exc.sqlstate in _NOT_MIGRATED:
        return (
            f"The database lacks what this pgscribe needs ({said}); run `pgscribe migrate`. "
            "What is missing: `pgscribe migrate --status`"
        )
    if isinstance(exc, psycopg.errors.InsufficientPrivilege):
        return f"PGSCRIBE_DATABASE_URL: its role may not do that ({said}); connect as `postgres`"
    return None


@contextmanager
def database() -> "Iterator[psycopg.Connection[Any]]":
    """Open the database that the settings name; each statement is a transaction of its own."""
    import psycopg

    from jobs.settings import Settings

    url = Settings.load().database_url.get_secret_value()
    with psycopg.connect(
        url, prepare_threshold=None, autocommit=True, connect_timeout=CONNECT_TIMEOUT
    ) as conn:
        yield conn


def for_each(ids: Iterable[UUID], act: Callable[[UUID], str]) -> None:
    """Do it with each, say what came of it, and leave with 1 if one of them was refused."""
    refused = False
    for one in ids:
        try:
            click.echo(f"{one}  {act(one)}")
        except PgscribeError as exc:
            refused = True
            click.echo(f"{one}  {exc}", err=True)
    sys.exit(refused)


def echo_rows(rows: Iterable[T], line: Callable[[T], str], *, as_json: bool, none: str) -> None:
    """Print what was found: a line for each, or all as one JSON array; say it if there is none.

    JSON knows no infinite number: what is one, as a limit that there is not, is null.
    """
    found = [*rows]
    if as_json:
        from pydantic_core import to_json

        click.echo(to_json(found, indent=2, inf_nan_mode="null"))
        return
    for row in found:
        click.echo(printable(line(row)))
    if not found:
        click.echo(none, err=True)


def echo_json(value: Any) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def printable(text: str) -> str:
    """Return a text of others with nothing in it that moves a terminal's cursor."""
    return "".join(character if character.isprintable() else " " for character in text)


def duration(text: str) -> timedelta | None:
    """Return hours or days, such as ``12h`` or ``90d``; ``None`` if it is neither."""
    match = re.fullmatch(r"([0-9]{1,5})([hd])", text)
    return match and timedelta(**{{"h": "hours", "d": "days"}[match[2]]: int(match[1])})
