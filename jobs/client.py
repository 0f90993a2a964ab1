"""A small client of the REST API."""

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote
from uuid import UUID

import httpx2

from jobs.errors import RequestFailed, ServerUnreachable
from jobs.models import ProcessingJob

POLL_INTERVAL = 0.25  # seconds


class Client:
    """Talks to a pgscribe server as the user of ``token``. Use as a context manager.

    Raises ``ServerUnreachable`` or ``RequestFailed``, the latter with the server's own message.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url = url
        headers = {"Authorization": f"Bearer {token}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=httpx2.Timeout(60))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def _request(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self._http.request(method, path, **arguments)
        except httpx2.TransportError as exc:
            raise ServerUnreachable(
                f"No pgscribe server answers at {self._url} ({exc}); start one with `pgscribe dev`"
            ) from exc
        if response.is_error:
            is_problem = "json" in response.headers.get("content-type", "")
            detail = response.json().get("detail") if is_problem else response.reason_phrase
            raise RequestFailed(f"{detail} (HTTP {response.status_code})")
        return response.json()

    def upload(self, path: Path) -> str:
        """Upload a file and return its ``file_path`` in storage."""
        with path.open("rb") as file:
            answer = self._request("PUT", f"/uploads/{quote(path.name)}", content=file)
        return str(answer["filePath"])

    def process(self, file_path: str, options: dict[str, Any] | None = None) -> UUID:
        """Submit a job and return its id."""
        body = {"filePath": file_path, "options": options or {}}
        return UUID(self._request("POST", "/process", json=body)["jobId"])

    def job(self, job_id: UUID) -> ProcessingJob:
        """Return a job as it is now."""
        return ProcessingJob.model_validate(self._request("GET", f"/jobs/{job_id}"))

    def wait(
        self, job_id: UUID, on_change: Callable[[ProcessingJob], None] = lambda _: None
    ) -> ProcessingJob:
        """Wait until a job has ended and return it; ``on_change`` sees it on the way."""
        while True:
            job = self.job(job_id)
            on_change(job)
            if job.status.ended:
                return job
            time.sleep(POLL_INTERVAL)
