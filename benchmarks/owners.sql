-- Owners with something in every table that an API reads, for benchmarks/owners.py.

-- endpoint --
insert into public.webhook_endpoints (user_id, url, description)
values (%(owner)s, 'https://example.org/' || %(word)s, %(word)s) returning id

-- job --
insert into public.processing_jobs (user_id, file_path, idempotency_key)
values (%(owner)s, %(owner)s || '/' || %(word)s || '-' || %(state)s || '.wav', %(word)s || %(state)s) returning id

-- set_queue --
update procrastinate.procrastinate_jobs set status = %(status)s::procrastinate.procrastinate_job_status
 where id = (select job_id::bigint from public.processing_jobs where id = %(id)s)

-- set_result --
update public.processing_jobs set result = %(result)s where id = %(id)s

-- set_error --
update public.processing_jobs set error_code = 'engine_crashed', error = %(word)s, note = %(word)s where id = %(id)s

-- attempt --
insert into public.processing_job_attempts (job_id, attempt, started_at, outcome, error_code, error)
values (%(id)s, 1, now(), 'failed', 'engine_crashed', %(word)s)
on conflict (job_id, attempt) do update set error = excluded.error

-- chunk --
insert into public.processing_job_chunks (job_id, index, start_seconds, end_seconds, call_id, result)
values (%(id)s, 0, 0, 10, 'call-' || %(word)s, jsonb_build_object('text', %(word)s::text, 'segments', '[]'::jsonb))

-- waveform --
insert into public.processing_job_waveforms (job_id, peaks) values (%(id)s, array_fill(7, array[2000]))

-- preparation --
insert into pgscribe.preparations (job_id, call_id) values (%(id)s, 'prepare-' || %(word)s)

-- correction --
insert into public.transcript_corrections (job_id, segment, text) values (%(id)s, 0, %(word)s)

-- webhook_attempts --
insert into public.webhook_attempts (delivery_id, attempt, started_at, seconds, response_excerpt)
select id, 1, now(), 1, %(word)s from public.webhook_deliveries where user_id = %(owner)s

-- deliveries --
select id::text from public.webhook_deliveries where user_id = %(owner)s

-- more_jobs --
insert into public.processing_jobs (user_id, file_path)
select id, id || '/more.mp3' from unnest(%(owners)s::uuid[]) id, generate_series(1, %(each)s::integer)

-- operator --
insert into pgscribe.operators (user_id) values (%(owner)s)
