"""A real web server in a thread, clients that read streams of events, and jobs to look on at."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from uuid import UUID

import httpx2
import psycopg
import uvicorn

from jobs.settings import Settings
from jobs.sql import ATTEMPTS
from web.app import create_app
from web.auth import issue_token
from web.events import EventHub
from web.server import Server

PATIENCE = 60.0  # seconds for what takes a few on an idle machine


@dataclass(frozen=True)
class Event:
    name: str
    data: Any
    id: str | None


class Stream:
    """Reads events as they come, in the order in which they come."""

    def __init__(self, response: httpx2.Response) -> None:
        self.response = response
        self.last_id = ""
        self._lines = response.iter_lines()

    def raw_line(self) -> str:
        return next(self._lines)

    def next(self) -> Event | None:
        """Return the next event; ``None`` at the end of the stream."""
        fields: dict[str, str] = {}
        for line in self._lines:
            if not line and "data" in fields:
                self.last_id = fields.get("id", self.last_id)
                return Event(fields["event"], json.loads(fields["data"]), fields.get("id"))
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
        return None

    def expect(self, name: str, **data: object) -> Event:
        """Return the next event, which has that name and these values."""
        event = self.next()
        assert event is not None, f"the stream has ended without {name}"
        found = {key: event.data.get(key) for key in data}
        assert (event.name, found) == (name, data), event
        return event

    def until(self, name: str, **data: object) -> Event:
        """Return the next event that has that name and these values."""
        while event := self.next():
            if event.name == name and {key: event.data.get(key) for key in data} == data:
                return event
        raise AssertionError(f"the stream has ended without {name}")

    def expect_end(self) -> None:
        event = self.next()
        assert event is None, event


class Site:
    """A web server on loopback."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        app = create_app(settings)
        self.hub: EventHub = app.state.events
        config = uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=15)
        self._server = Server(config, on_stop=self.hub.end_streams)
        self._thread = threading.Thread(target=self._server.run)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: self._server.started, "the server has started")
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.stop()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def headers(self, user: UUID, lifetime: float = 600, **more: str) -> dict[str, str]:
        token = issue_token(self._settings, user, lifetime=lifetime)
        return {"Authorization": f"Bearer {token}"} | more

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, user: UUID) -> httpx2.Response:
        """Return an answer that is no stream."""
        return self.client.get(path, headers=self.headers(user))

    @contextmanager
    def open(
        self, path: str, user: UUID, *, last_id: str = "", lifetime: float = 600
    ) -> Iterator[Stream]:
        more = {"Last-Event-ID": last_id} if last_id else {}
        headers = self.headers(user, lifetime, **more)
        with (
            httpx2.Client(base_url=self.url, timeout=PATIENCE) as client,
            client.stream("GET", path, headers=headers) as response,
        ):
            assert response.status_code == 200, response.read()
            yield Stream(response)


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Work:
    """Jobs as workers and owners change them. The connection may have to be opened again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._conn: psycopg.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def allow_many_jobs(self) -> None:
        self.execute("select limit_owners(max_queued => 1000000)")

    def close(self) -> None:
        if self._conn is not None:
            self._conn.close()

    def execute(self, statement: str | bytes, values: Any = ()) -> list[Any]:
        if self._conn is None or self._conn.closed:
            self._conn = psycopg.connect(self.url, autocommit=True)
        query = statement if isinstance(statement, bytes) else statement.encode()
        cursor = self._conn.execute(query, values)
        return cursor.fetchall() if cursor.description else []

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Do several things in one transaction: a worker gives back what nobody seems to hold."""
        self.execute("begin")
        yield
        self.execute("commit")

    def insert(self, user: UUID, name: str = "talk.mp3") -> UUID:
        ((job_id,),) = self.execute(
            "insert into processing_jobs (user_id, file_path) values (%s, %s) returning id",
            (user, f"{user}/{name}"),
        )
        found: UUID = job_id
        return found

    def insert_many(self, user: UUID, count: int) -> list[UUID]:
        rows = self.execute(
            "insert into processing_jobs (user_id, file_path)"
            " select %s, 'a/b.mp3' from generate_series(1, %s) returning id",
            (user, count),
        )
        return [row[0] for row in rows]

    def set_queue_status(self, status: str, *job_ids: UUID) -> None:
        self.execute(
            "update procrastinate.procrastinate_jobs set status = %s where id in"
            " (select job_id::bigint from processing_jobs where id = any (%s))",
            (status, list(job_ids)),
        )

    def start(self, *job_ids: UUID) -> None:
        self.set_queue_status("doing", *job_ids)

    def progress(self, job_id: UUID, progress: float) -> None:
        self.execute(
            ATTEMPTS["write_progress"], {"job_id": job_id, "attempt": 1, "progress": progress}
        )

    def note(self, job_id: UUID, note: str) -> None:
        self.execute("select report_progress(%s, null, %s)", (job_id, note))

    def plan(self, job_id: UUID, chunks: int) -> None:
        self.execute(
            "insert into processing_job_chunks (job_id, index, start_seconds, end_seconds)"
            " select %s, n, n, n + 1 from generate_series(0, %s - 1) n",
            (job_id, chunks),
        )

    def store(self, job_id: UUID, chunk: int, text: str, language: str = "en") -> None:
        result = json.dumps({"text": text, "language": language})
        self.execute("select pgscribe.store_chunk(%s, 1, %s, %s, 0, 0)", (job_id, chunk, result))

    def complete(self, *job_ids: UUID) -> None:
        self.execute(
            "update processing_jobs set result = '{}' where id = any (%s)", (list(job_ids),)
        )
        self.set_queue_status("succeeded", *job_ids)

    def delete(self, job_id: UUID) -> None:
        self.execute("delete from processing_jobs where id = %s", (job_id,))
