-- Jobs of 500 owners over twenty days, half of them one owner's; one in twenty has failed, and the newest thousand have the
-- transcript of a minute. Rows that have ended come with all they need: run as a superuser, without triggers.

-- ended --
with people as (
  insert into auth.users (id, email)
  select case n when 1 then %(owner)s::uuid else gen_random_uuid() end, n || '@example.org' from generate_series(1, 500) n returning id),
owners as (select array_agg(id order by id <> %(owner)s) as ids from people),
finished as materialized (
  select gen_random_uuid() as id, n, now() - interval '20 days' * (1 - n::float8 / %(jobs)s) as at, n %% 20 = 7 as bad
    from generate_series(1, %(jobs)s::int) n),
queue_jobs as (
  insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, args, status, attempts)
  select n, 'transcription', 'transcribe', jsonb_build_object('processing_job_id', id),
         case when bad then 'failed' else 'succeeded' end::procrastinate.procrastinate_job_status, 1 from finished)
insert into public.processing_jobs
  (id, user_id, file_path, job_id, status, progress, attempt, started_at, completed_at, created_at, audio_seconds, result,
   error_code, error, usage)
select f.id, case when n %% 2 = 0 then o.ids[1] else o.ids[2 + n %% 499] end, 'a/b.mp3', n::text,
       case when bad then 'failed' else 'completed' end, 1, 1, at - interval '30 s', at, at - interval '31 s', 60,
       case when bad then null when %(jobs)s - n < 1000 then %(transcript)s::jsonb else '{"text": ""}' end,
       case when bad then 'timeout' end, case when bad then 'It took too long.' end,
       '{"calls": 5, "gpu_seconds": 12.5, "cpu_seconds": 1, "estimated_cost": 0.004}'
  from finished f, owners o

-- move_sequence --
select setval('procrastinate.procrastinate_jobs_id_seq', %(jobs)s + 1)

-- allow --
select public.limit_owners(max_queued => 1000000, max_running => 1000)

-- operate --
insert into pgscribe.operators (user_id) values (%(owner)s)

-- waiting --
insert into public.processing_jobs (user_id, file_path)
select (select array_agg(id order by id) from (select id from auth.users order by id <> %(owner)s, id limit 100) u)[1 + n %% 100], 'a/b.mp3'
  from generate_series(1, %(jobs)s::int) n

-- close_day --
-- Workers do so once a minute, until all days that are over are added up.
select pgscribe.close_day()

-- tidy --
vacuum analyze

-- with_transcripts --
select id::text from public.processing_jobs where user_id = %(owner)s and result ? 'segments' order by created_at desc limit 500
