"""A client of ``benchmarks.door``: it inserts jobs by one way until it is killed.

``python -m benchmarks.door_client WAY URL USER NUMBER`` prints a line for each transaction: the
rows whose commit was answered, or ``undone``. ``DOOR_TOKEN`` is the user's, for REST.
"""

import http.client
import json
import os
import random
import sys
from collections.abc import Callable
from urllib.parse import urlsplit

import psycopg

UNDONE = 0.3  # of the transactions: rolled back, or refused as a whole
MOST = 20  # rows a transaction
ROLES = ("postgres", "authenticated", "service_role")
INSERT = (
    b"insert into public.processing_jobs (user_id, file_path)"
    b" select %(user)s, unnest(%(paths)s::text[]) returning id"
)


def say(line: str) -> None:
    """Print a line as a whole, or not at all."""
    os.write(1, f"{line}\n".encode())


class Undone(Exception):
    """The transaction is to be rolled back."""


class Client:
    """What all ways share. ``chance`` differs from process to process."""

    def __init__(self, way: str, user: str, chance: random.Random) -> None:
        self._way = way
        self._user = user
        self._chance = chance

    def paths(self) -> list[str]:
        """Return as many names of files as there are to be rows."""
        count = self._chance.randint(1, MOST)
        return [f"{self._user}/{self._way}/{n}.mp3" for n in range(count)]

    def undo(self) -> bool:
        """Return whether this transaction is to leave nothing."""
        return self._chance.random() < UNDONE


class Sql(Client):
    """Inserts as a role, in transactions of one or several statements."""

    def insert(self, url: str) -> None:
        """Insert until killed."""
        claims = json.dumps({"sub": self._user, "role": self._way})
        with psycopg.connect(url, autocommit=True) as conn:
            while True:
                try:
                    say(" ".join(self._transaction(conn, claims)))
                except (Undone, psycopg.errors.DivisionByZero):
                    say("undone")

    def _transaction(self, conn: psycopg.Connection[tuple[object, ...]], claims: str) -> list[str]:
        ids: list[str] = []
        with conn.transaction():
            if self._way != "postgres":
                conn.execute(
                    "select set_config('role', %s, true),"
                    " set_config('request.jwt.claims', %s, true)",
                    (self._way, claims),
                )
            for _ in range(self._chance.randint(1, 3)):
                values = {"user": self._user, "paths": self.paths()}
                ids += [str(row[0]) for row in conn.execute(INSERT, values)]
            if self.undo():
                if self._chance.random() < 0.5:  # noqa: PLR2004
                    conn.execute("select 1 / 0")
                raise Undone
        return ids


class Rest(Client):
    """Submits by ``POST /process``, or by ``POST /process/batch``."""

    def insert(self, url: str) -> None:
        """Submit until killed, or until the server is gone."""
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        bearer = f"Bearer {os.environ['DOOR_TOKEN']}"
        head = {"Authorization": bearer, "Content-Type": "application/json"}
        while True:
            connection.request("POST", *self._request(), head)
            answer = connection.getresponse()
            body = json.loads(answer.read())
            if answer.status == http.HTTPStatus.ACCEPTED:
                say(" ".join(job["jobId"] for job in body.get("jobs", [body])))
            else:
                say("undone")

    def _request(self) -> tuple[str, str]:
        wrong = {"options": {"model": 1}} if self.undo() else {}
        jobs: list[dict[str, object]] = [{"filePath": path} for path in self.paths()]
        jobs[-1] |= wrong
        if self._way == "batch":
            return "/process/batch", json.dumps({"jobs": jobs})
        return "/process", json.dumps(jobs[-1])


WAYS: dict[str, Callable[..., Sql | Rest]] = dict.fromkeys(ROLES, Sql) | {
    "one": Rest,
    "batch": Rest,
}


def main(way: str, url: str, user: str, number: str) -> None:
    """Insert."""
    WAYS[way](way, user, random.Random(number)).insert(url)  # noqa: S311 - no secret


if __name__ == "__main__":
    main(*sys.argv[1:])
