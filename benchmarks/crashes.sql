-- What benchmarks/crashes.py asks for.

-- insert --
insert into public.processing_jobs (user_id, file_path, options, max_attempts)
select %(owner)s, %(path)s, jsonb_build_object('model', %(model)s::text), 20 from generate_series(1, %(jobs)s::integer)

-- unfinished --
select count(*) from public.processing_jobs where completed_at is null

-- transcribing --
select count(*) from public.processing_jobs j
 where j.status = 'processing'
   and exists (select from public.processing_job_chunks c where c.job_id = j.id and c.call_id is not null and c.result is null)

-- failed_attempts --
select count(*) from public.processing_job_attempts

-- completed --
select count(*) from public.processing_jobs where status = 'completed' and length(result ->> 'text') > 100
