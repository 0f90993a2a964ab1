-- Jobs as their owners see them: every query runs under row level security.

-- submit --
insert into public.processing_jobs (user_id, file_path, options, scheduled_at)
values (auth.uid(), %(file_path)s, %(options)s, %(scheduled_at)s)
returning id

-- get --
select * from public.processing_jobs where id = %(id)s

-- list --
select id, created_at, updated_at, scheduled_at, started_at, completed_at, user_id, job_id,
       file_path, options, status, progress, attempt, audio_seconds, error_code, error
  from public.processing_jobs
 where %(status)s::text is null or status = %(status)s
 order by created_at desc, id desc
 limit %(limit)s
