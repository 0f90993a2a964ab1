-- Jobs as their owners see them: every query runs under row level security.

-- submit --
-- With an idempotency key that was used before this inserts nothing, unless the job is another one:
-- that is refused.
insert into public.processing_jobs (user_id, file_path, options, scheduled_at, priority, max_attempts, idempotency_key)
values (auth.uid(), %(file_path)s, %(options)s, %(scheduled_at)s, %(priority)s, %(max_attempts)s, %(idempotency_key)s)
on conflict (user_id, idempotency_key) where idempotency_key is not null do nothing
returning id

-- get_by_key --
select id from public.processing_jobs where user_id = auth.uid() and idempotency_key = %(idempotency_key)s

-- cancel --
select * from public.cancel_processing_job(%(id)s)

-- retry --
select * from public.retry_processing_job(%(id)s)

-- get --
select * from public.processing_jobs where id = %(id)s

-- status --
select status, progress from public.processing_jobs where id = %(id)s

-- lock_requests --
-- Until the end of the transaction, others with this kind of request wait.
select pg_advisory_xact_lock(hashtextextended('pgscribe.requests ' || auth.uid()::text || %(prefix)s, 0))

-- find_request --
-- By index, and exactly, in any collation: prefixes are of small letters and digits, and what follows is hexadecimal.
select id, idempotency_key from public.processing_jobs
 where user_id = auth.uid() and idempotency_key >= %(prefix)s and idempotency_key < %(prefix)s || 'z'
   and starts_with(idempotency_key, %(prefix)s)
   and (%(ended_within)s::interval is null or completed_at is null
        or status = 'completed' and completed_at > now() - %(ended_within)s::interval)
 order by created_at desc, id limit 1

-- list --
select id, created_at, updated_at, scheduled_at, started_at, completed_at, user_id, job_id,
       file_path, options, status, progress, attempt, priority, max_attempts, idempotency_key, due_at,
       cancel_requested_at, retry_requested_at, audio_seconds, estimated_seconds, usage, note,
       error_code, error
  from public.processing_jobs
 where %(status)s::text is null or status = %(status)s
 order by created_at desc, id desc
 limit %(limit)s

-- attempts --
select attempt, worker_id, started_at, ended_at, outcome, error_code, error
  from public.processing_job_attempts where job_id = %(id)s order by attempt
