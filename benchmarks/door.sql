-- What benchmarks/door.py compares.

-- rows --
select split_part(p.file_path, '/', 2), count(*), count(*) filter (where q.id is null)
  from public.processing_jobs p
  left join procrastinate.procrastinate_jobs q
    on q.id = p.job_id::bigint and q.args ->> 'processing_job_id' = p.id::text and q.queue_name = 'transcription'
 group by 1

-- without_row --
select count(*) from procrastinate.procrastinate_jobs q
 where q.queue_name = 'transcription'
   and not exists (select from public.processing_jobs p where p.job_id = q.id::text)

-- gone --
select count(*) from unnest(%(ids)s::uuid[]) told (id)
 where not exists (select from public.processing_jobs p where p.id = told.id)
