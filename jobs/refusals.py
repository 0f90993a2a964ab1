"""What the database refuses, as errors that name the field, the limit and the way out."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from jobs.errors import InvalidInput, LimitReached, NotAllowed

OVER_LIMIT = "PT429"  # an SQLSTATE; PostgREST answers 429 for it


@contextmanager
def refusals(where: str = "") -> Iterator[None]:
    """Say what the database has refused, and ``where`` in the request that was."""
    try:
        yield
    except psycopg.errors.CheckViolation as exc:
        text = ". ".join(filter(None, (exc.diag.message_primary, exc.diag.message_hint)))
        raise InvalidInput(where + text, field=where + (exc.diag.column_name or "")) from exc
    except psycopg.errors.InsufficientPrivilege as exc:
        raise NotAllowed(
            f"{where}file_path: must lie in your own folder, <your user id>/…; "
            "use the path that the upload returned"
        ) from exc
    except psycopg.errors.ForeignKeyViolation as exc:
        raise NotAllowed("This token's user does not exist in auth.users.") from exc
    except (psycopg.DataError, UnicodeEncodeError, RecursionError) as exc:
        raise InvalidInput(
            f"{where and where.rstrip('.') + ': '}The request holds what Postgres can't store: "
            "a NUL character, half a surrogate pair, an infinite number, or objects nested deeply",
            field=where.rstrip(".") or None,
        ) from exc
    except psycopg.ProgrammingError as exc:
        if exc.sqlstate != OVER_LIMIT:
            raise
        raise _limit_reached(exc.diag) from exc


def _limit_reached(said: psycopg.errors.Diagnostic) -> LimitReached:
    text = ". ".join(filter(None, (said.message_primary, said.message_hint)))
    detail = json.loads(said.message_detail or "{}")
    return LimitReached(text, limit=said.column_name, retry_after=detail.get("retry_after", 60))
