-- A million jobs of 500 owners over twenty days, half of them one owner's; one in twenty has failed. The steps to fill run as a
-- superuser, without triggers. What begins with owner_ is asked by the owner of half of all
-- jobs, who is an operator.

-- fill --
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
       case when bad then 'failed' else 'completed' end, 1, 1, at - interval '30 s', at, at - interval '31 s', 300,
       case when bad then null else '{}'::jsonb end, case when bad then 'timeout' end, case when bad then 'It took too long.' end,
       '{"calls": 5, "gpu_seconds": 12.5, "cpu_seconds": 1, "estimated_cost": 0.004}'
  from finished f, owners o

-- move_sequence --
select setval('procrastinate.procrastinate_jobs_id_seq', %(jobs)s)

-- tidy --
vacuum analyze public.processing_jobs, procrastinate.procrastinate_jobs

-- allow --
select public.limit_owners(max_queued => 1000000, max_running => 1000)

-- submit --
insert into public.processing_jobs (user_id, file_path)
select u.id, 'a/b.mp3' from (select id from auth.users order by id limit 50) u, generate_series(1, 100)

-- register --
select worker_id from procrastinate.procrastinate_register_worker_v1()

-- start --
select from pgscribe.turn(%(worker)s, null, 50, false, '{}', 3, null)

-- operate --
insert into pgscribe.operators (user_id) values (%(owner)s)

-- act_as --
select set_config('role', 'authenticated', true), set_config('request.jwt.claims', json_build_object('sub', %(owner)s::text)::text, true)

-- measure_one_job --
select * from public.job_inspection where id = (select id from public.processing_jobs where user_id = %(owner)s limit 1)

-- measure_the_newest_100_which_wait --
select * from public.job_inspection order by created_at desc limit 100

-- owner_the_newest_100_of_500k --
select * from public.job_inspection order by created_at desc limit 100

-- measure_100_that_have_failed --
select * from public.job_inspection where status = 'failed' order by created_at desc limit 100

-- measure_100_with_an_error --
select * from public.job_inspection where error_code = 'timeout' order by created_at desc limit 100

-- measure_the_50_that_run --
select * from public.job_inspection where status = 'processing'

-- owner_operator_inspect_jobs_100_that_have_failed --
select * from public.operator_inspect_jobs('failed', "limit" => 100)

-- measure_whose_jobs_wait --
select j.user_id, u.email, count(*), min(j.waiting_since) from public.job_inspection j left join auth.users u on u.id = j.user_id
 where j.status = 'queued' group by 1, 2

-- measure_what_all_of_them_cost --
select j.user_id, u.email, count(*), sum(j.estimated_cost) from public.job_inspection j left join auth.users u on u.id = j.user_id
 where j.completed_at > now() - interval '20 days' group by 1, 2

-- measure_queue_health --
select * from public.queue_health
