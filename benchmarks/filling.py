"""Databases with many jobs: those that ended are put there, those that wait came by the door."""

import json
from pathlib import Path
from uuid import UUID

import psycopg

from db import migrate, named_queries
from db.embedded import SUPERUSER, EmbeddedPostgres

OWNER = UUID(int=1)  # of half of all jobs that ended; an operator
QUERIES = named_queries.load(Path(__file__).with_suffix(".sql"))
SENTENCE = "It was the best of times, it was the worst of times."
TRANSCRIPT = {
    "text": f"{SENTENCE} " * 15,
    "language": "en",
    "duration": 60.0,
    "engine": "faster-whisper",
    "model": "base",
    "segments": [
        {
            "start": number * 4.0,
            "end": number * 4.0 + 4,
            "text": SENTENCE,
            "avg_logprob": -0.2,
            "no_speech_prob": 0.01,
            "compression_ratio": 1.4,
        }
        for number in range(15)
    ],
}


def fill(server: EmbeddedPostgres, name: str, *, ended: int, waiting: int = 0) -> None:
    """Make a migrated database with so many jobs."""
    server.create_database(name)
    server.bootstrap(name)
    migrate.migrate(server.url(database=name))
    values = {"owner": OWNER, "jobs": ended, "transcript": json.dumps(TRANSCRIPT)}
    with psycopg.connect(server.url(database=name, user=SUPERUSER), autocommit=True) as admin:
        with admin.transaction():
            admin.execute("set local session_replication_role = replica")
            admin.execute(QUERIES["ended"], values)
        admin.execute(QUERIES["move_sequence"], values)
    with psycopg.connect(server.url(database=name), autocommit=True) as conn:
        conn.execute(QUERIES["allow"])
        conn.execute(QUERIES["operate"], values)
        while conn.execute(QUERIES["close_day"]).fetchone() == (True,):
            pass
        if waiting:
            conn.execute(QUERIES["waiting"], {"owner": OWNER, "jobs": waiting})
    with psycopg.connect(server.url(database=name, user=SUPERUSER), autocommit=True) as admin:
        admin.execute(QUERIES["tidy"])


def with_transcripts(url: str) -> list[str]:
    """Return ids of jobs of the owner's whose transcripts have segments."""
    with psycopg.connect(url) as conn:
        return [row[0] for row in conn.execute(QUERIES["with_transcripts"], {"owner": OWNER})]
