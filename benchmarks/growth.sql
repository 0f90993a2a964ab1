-- What is asked of databases of different sizes. What begins with owner_ is asked by the owner of half of all jobs that ended,
-- who is an operator; what begins with admin_ by `postgres`.

-- act_as --
select set_config('role', 'authenticated', true), set_config('request.jwt.claims', json_build_object('sub', %(owner)s::text)::text, true)

-- admin_health --
select * from public.queue_health

-- owner_metrics --
select public.operator_metrics()

-- admin_newest --
select * from public.job_inspection order by created_at desc limit 100

-- owner_newest --
select * from public.job_inspection order by created_at desc limit 100

-- owner_failed --
select * from public.operator_inspect_jobs('failed', "limit" => 100)

-- admin_whose_wait --
select j.user_id, u.email, count(*), min(j.waiting_since) from public.job_inspection j left join auth.users u on u.id = j.user_id
 where j.status = 'queued' group by 1, 2

-- admin_cost --
select j.user_id, u.email, count(*), sum(j.estimated_cost) from public.job_inspection j left join auth.users u on u.id = j.user_id
 where j.completed_at > now() - interval '20 days' group by 1, 2

-- submit --
insert into public.processing_jobs (user_id, file_path) values (%(owner)s, 'a/b.mp3')

-- submit_many --
insert into public.processing_jobs (user_id, file_path) select %(owner)s, 'a/b.mp3' from generate_series(1, 1000)

-- others --
-- Whoever is not the owner of half of all jobs.
select id from auth.users where id <> %(owner)s order by id limit %(users)s

-- active_time --
select active_time from pg_stat_database where datname = %(database)s
