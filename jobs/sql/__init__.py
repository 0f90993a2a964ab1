"""Named queries, one file per concern."""

from pathlib import Path

from db import named_queries

_HERE = Path(__file__).parent

JOBS = named_queries.load(_HERE / "jobs.sql")
ATTEMPTS = named_queries.load(_HERE / "attempts.sql")
RETENTION = named_queries.load(_HERE / "retention.sql")
SESSIONS = named_queries.load(_HERE / "sessions.sql")
DEV = named_queries.load(_HERE / "dev.sql")
OPERATE = named_queries.load(_HERE / "operate.sql")
CALLS = named_queries.load(_HERE / "calls.sql")
EVENTS = named_queries.load(_HERE / "events.sql")
QUEUE = named_queries.load(_HERE / "queue.sql")
TRACING = named_queries.load(_HERE / "tracing.sql")
TRANSCRIPTS = named_queries.load(_HERE / "transcripts.sql")
CORRECTIONS = named_queries.load(_HERE / "corrections.sql")
KEYS = named_queries.load(_HERE / "keys.sql")
STORAGE = named_queries.load(_HERE / "storage.sql")
WEBHOOKS = named_queries.load(_HERE / "webhooks.sql")
WEB_SESSIONS = named_queries.load(_HERE / "web_sessions.sql")
DOCTOR = named_queries.load(_HERE / "doctor.sql")
