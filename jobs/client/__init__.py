"""Clients of the REST API for Python: ``JobClient`` blocks, ``AsyncJobClient`` is awaited."""

from jobs.client.clients import AsyncJobClient, JobClient
from jobs.client.flows import Retries
from jobs.client.requests import JobChanged, JobDeleted, JobEvent, NewJob, PartialText
from jobs.client.webhooks import verify_webhook
from jobs.errors import RequestFailed, ServerUnreachable, WaitTimedOut, WebhookNotVerified
from jobs.models import Hit, SearchResult

__all__ = [
    "AsyncJobClient",
    "Hit",
    "JobChanged",
    "JobClient",
    "JobDeleted",
    "JobEvent",
    "NewJob",
    "PartialText",
    "RequestFailed",
    "Retries",
    "SearchResult",
    "ServerUnreachable",
    "WaitTimedOut",
    "WebhookNotVerified",
    "verify_webhook",
]
