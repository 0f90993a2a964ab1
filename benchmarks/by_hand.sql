-- What benchmarks/by_hand.py tries, and how it sees what came of it.

-- columns --
-- Those of a table that only pgscribe writes, with the SQL of a value that is another one.
select a.attname,
       case format_type(a.atttypid, null)
         when 'text' then '''by hand''' when 'jsonb' then '''{"text": "by hand"}''::jsonb' when 'uuid' then 'gen_random_uuid()'
         when 'timestamp with time zone' then '''2001-01-01''::timestamptz' when 'smallint[]' then 'array[9]::smallint[]'
         else format('(coalesce(%%I, 0) + 1)', a.attname) end
  from pg_catalog.pg_attribute a
 where a.attrelid = %(relation)s::regclass and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
   and not has_column_privilege('authenticated', a.attrelid, a.attnum, 'update')
   and a.attname <> 'status'
 order by a.attnum

-- relations --
-- Tables with rows of jobs that users may read.
select c.oid::regclass::text
  from pg_catalog.pg_class c
 where c.relnamespace = 'public'::regnamespace and c.relkind = 'r'
   and exists (select from pg_catalog.pg_attribute a where a.attrelid = c.oid and a.attname in ('job_id', 'delivery_id'))
 order by 1

-- status --
select status from public.processing_jobs where id = %(id)s

-- set_status --
update public.processing_jobs set status = %(status)s where id = %(id)s

-- set_status_and_all --
update public.processing_jobs
   set status = %(status)s, result = '{"text": "by hand"}', error = 'by hand', error_code = 'by_hand', completed_at = now()
 where id = %(id)s

-- insert_status --
insert into public.processing_jobs (id, user_id, file_path, status, result, error, error_code)
values (%(new)s, %(owner)s, %(owner)s || '/by-hand.wav', %(status)s, '{}', 'by hand', 'by_hand')

-- switch_on --
-- What the mirror's own trigger sets for as long as it writes; anybody may set it.
select set_config('pgscribe.mirroring', 'on', true)

-- forge --
update public.processing_jobs
   set status = %(status)s, result = '{"text": "by hand"}', error = 'by hand', error_code = 'by_hand', completed_at = now(),
       updated_at = clock_timestamp() + interval '1 s'
 where id = %(id)s

-- move_queue --
update procrastinate.procrastinate_jobs set status = 'doing'
 where id = (select job_id::bigint from public.processing_jobs where id = %(id)s)

-- agreement --
-- As tests/faults/invariants.py has it.
select count(*), count(*) filter (where q.id is null or p.status <> pgscribe.job_status(q.status))
  from public.processing_jobs p left join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
