"""What must hold once the faults are over, as queries for what violates it."""

from collections import Counter
from collections.abc import Iterable

import psycopg

from tests.faults.fleet import Execution

ALWAYS = {
    "row and queue job disagree": """
        select p.id, p.status, q.status as queue_status
          from processing_jobs p
          left join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
         where q.id is null or p.status <> pgscribe.job_status(q.status)""",
    "a queue job without a row": """
        select q.id, q.status from procrastinate.procrastinate_jobs q
         where q.queue_name = 'transcription'
           and not exists (select from processing_jobs p where p.job_id = q.id::text)
           and not (q.status = 'doing' and q.abort_requested)""",
    "completed without a result": """
        select id from processing_jobs
         where status = 'completed'
           and (result is null or completed_at is null or progress <> 1)""",
    "completed twice": """
        select job_id, count(*) from procrastinate.procrastinate_events
         where type = 'succeeded' group by job_id having count(*) > 1""",
    # An earlier attempt may have stored the chunk; never another job's, nor one to come.
    "the result is another job's": """
        select id, attempt, result ->> 'text' as text from processing_jobs
         where status = 'completed' and result ->> 'engine' = 'scripted' and not exists (
           select from generate_series(1, attempt) n where result ->> 'text' = id || ' ' || n)""",
    "completed, and a call is open or a chunk is missing": """
        select p.id, c.index, c.call_id
          from processing_jobs p join processing_job_chunks c on c.job_id = p.id
         where p.status = 'completed' and (c.result is null or c.call_id is not null)""",
    "attempts are missing": """
        select p.id, p.status, p.attempt, attempts
          from processing_jobs p cross join lateral (
            select array(select a.attempt from processing_job_attempts a
                          where a.job_id = p.id order by 1)) x (attempts)
         where attempts <> array(select generate_series(
           1, p.attempt - (p.status in ('processing', 'completed'))::integer))""",
    "the last attempt is not the one that failed": """
        select p.id, a.outcome
          from processing_jobs p
          join processing_job_attempts a on a.job_id = p.id and a.attempt = p.attempt
         where p.status = 'failed' and a.outcome <> 'failed'""",
    "held by a worker that is gone": """
        select p.id, q.worker_id
          from processing_jobs p join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
         where p.status = 'processing' and not exists (
           select from procrastinate.procrastinate_workers w where w.id = q.worker_id)""",
}
AT_THE_END = {
    "not ended": """
        select id, status, attempt, file_path, due_at, cancel_requested_at from processing_jobs
         where status not in ('completed', 'failed', 'cancelled')""",
    "ended without a time": "select id from processing_jobs where completed_at is null",
    "a queue job is held": """
        select id, worker_id, queue_name from procrastinate.procrastinate_jobs
         where status = 'doing' and queue_name = 'transcription'""",
    "a queue job without a row at the end": """
        select q.id, q.status from procrastinate.procrastinate_jobs q
         where q.queue_name = 'transcription'
           and not exists (select from processing_jobs p where p.job_id = q.id::text)""",
}


def violations(conn: psycopg.Connection[object], checks: dict[str, str]) -> list[str]:
    """Return what is violated, with up to three examples each."""
    found = []
    for name, query in checks.items():
        rows = conn.execute(query.encode()).fetchall()
        if rows:
            found.append(f"{name} ({len(rows)}): {rows[:3]}")
    return found


def assert_consistent(conn: psycopg.Connection[object]) -> None:
    """Check all that must hold once every job has ended."""
    found = violations(conn, ALWAYS | AT_THE_END)
    assert not found, "\n".join(found)


def assert_each_attempt_ran_once(ledger: Iterable[Execution]) -> None:
    starts = Counter((entry.job_id, entry.attempt) for entry in ledger if entry.event == "start")
    twice = [attempt for attempt, times in starts.items() if times > 1]
    assert not twice, f"started twice: {twice}"
