-- Jobs as their owners see them: every query runs under row level security.

-- submit --
-- With an idempotency key that was used before this inserts nothing, unless the job is another one:
-- that is refused.
insert into public.processing_jobs
  (user_id, file_path, options, audio_url, webhook_url, scheduled_at, priority, max_attempts, idempotency_key, traceparent)
values (auth.uid(), %(file_path)s, %(options)s, %(audio_url)s, %(webhook_url)s, %(scheduled_at)s, %(priority)s,
        %(max_attempts)s, %(idempotency_key)s, %(traceparent)s)
on conflict (user_id, idempotency_key) where idempotency_key is not null do nothing
returning id

-- submit_many --
-- As submit, in the order that they are given; those whose key was used before are left out.
insert into public.processing_jobs
  (user_id, file_path, options, audio_url, webhook_url, scheduled_at, priority, max_attempts, idempotency_key, traceparent)
select auth.uid(), j.*, %(traceparent)s
  from unnest(%(file_path)s::text[], %(options)s::jsonb[], %(audio_url)s::text[], %(webhook_url)s::text[],
              %(scheduled_at)s::timestamptz[], %(priority)s::smallint[], %(max_attempts)s::smallint[],
              %(idempotency_key)s::text[]) j
on conflict (user_id, idempotency_key) where idempotency_key is not null do nothing
returning id, idempotency_key

-- get_by_keys --
select idempotency_key, id from public.processing_jobs
 where user_id = auth.uid() and idempotency_key = any (%(keys)s)

-- hold_keys --
-- Until the transaction ends; false where another one holds one of them.
select coalesce(bool_and(pg_try_advisory_xact_lock(hashtextextended('pgscribe:' || auth.uid() || ':' || key, 0))), true)
  from unnest(%(keys)s::text[]) key

-- get_by_key --
select id from public.processing_jobs where user_id = auth.uid() and idempotency_key = %(idempotency_key)s

-- cancel --
select * from public.cancel_processing_job(%(id)s)

-- retry --
select * from public.retry_processing_job(%(id)s)

-- delete --
select public.delete_processing_job(%(id)s, %(keep_audio)s)

-- limits --
select "limit", maximum, current from public.my_limits()

-- search --
select id, created_at, file_path, language, audio_seconds, hits
  from public.search_transcripts(%(q)s, %(limit)s, %(after_at)s, %(after_id)s)

-- get --
select * from public.processing_jobs where id = %(id)s

-- get_without_result --
select id, created_at, updated_at, scheduled_at, started_at, completed_at, user_id, job_id,
       file_path, audio_url, webhook_url, options, status, progress, attempt, priority, max_attempts, idempotency_key, traceparent, due_at,
       cancel_requested_at, retry_requested_at, audio_seconds, estimated_seconds, usage, note,
       error_code, error, null::jsonb as result
  from public.processing_jobs where id = %(id)s

-- waveform --
select p.audio_seconds as duration, coalesce(w.peaks, '{}') as peaks
  from public.processing_jobs p left join public.processing_job_waveforms w on w.job_id = p.id
 where p.id = %(id)s

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
       file_path, audio_url, webhook_url, options, status, progress, attempt, priority, max_attempts, idempotency_key, traceparent, due_at,
       cancel_requested_at, retry_requested_at, audio_seconds, estimated_seconds, usage, note,
       error_code, error
  from public.processing_jobs
 where (%(status)s::text is null or status = %(status)s)
   and (%(after_at)s::timestamptz is null or (created_at, id) < (%(after_at)s, %(after_id)s::uuid))
 order by created_at desc, id desc
 limit %(limit)s

-- attempts --
select attempt, worker_id, started_at, ended_at, outcome, error_code, error
  from public.processing_job_attempts where job_id = %(id)s order by attempt
