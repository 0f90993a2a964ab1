"""What the commands of ``pgscribe`` have in common. Nothing heavy is imported with it."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from jobs.errors import PgscribeError

if TYPE_CHECKING:
    import psycopg


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Show known errors as one plain message, without a stack."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PgscribeError as exc:
            raise click.ClickException(str(exc)) from exc
        except Exception as exc:
            psycopg = sys.modules.get("psycopg")  # imported only by what uses the database
            if psycopg is None or not isinstance(exc, psycopg.OperationalError):
                raise
            raise click.ClickException(f"The database is out of reach: {exc}") from exc

    return wrapped


@contextmanager
def database() -> "Iterator[psycopg.Connection[Any]]":
    """Open the database that the settings name; each statement is a transaction of its own."""
    import psycopg

    from jobs.settings import Settings

    url = Settings.load().database_url.get_secret_value()
    with psycopg.connect(url, prepare_threshold=None, autocommit=True) as conn:
        yield conn


def duration(text: str) -> timedelta | None:
    """Return hours or days, such as ``12h`` or ``90d``; ``None`` if it is neither."""
    match = re.fullmatch(r"([0-9]{1,5})([hd])", text)
    return match and timedelta(**{{"h": "hours", "d": "days"}[match[2]]: int(match[1])})
