-- Streams of events say that a job is to be cancelled, so that every page shows it at once.

create or replace function pgscribe.look(lookups jsonb, out now bigint, out answers json)
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
declare
  lookup jsonb;
  ids uuid[];
  running uuid[];
  newest uuid[];
  jobs json;
  texts json;
  each json[] := '{}';
begin
  look.now := extract(epoch from clock_timestamp()) * 1000000;
  for lookup in select * from jsonb_array_elements(lookups) loop
    perform set_config('role', 'authenticated', true), set_config('request.jwt.claims', lookup ->> 'claims', true);
    running := '{}';
    newest := '{}';
    if (lookup -> 'list')::boolean then
      running := array(select p.id from public.processing_jobs p
                        where p.user_id = (lookup ->> 'owner')::uuid and p.status = 'processing' limit 100);
      newest := array(select p.id from public.processing_jobs p
                       where p.user_id = (lookup ->> 'owner')::uuid order by p.created_at desc, p.id desc limit 100);
    end if;
    ids := array(select x::uuid from jsonb_array_elements_text(lookup -> 'jobs') x) || running || newest;
    select json_agg(j) into jobs from (
      select p.id, p.file_path, p.status, p.progress, p.attempt, p.audio_seconds, p.note, p.error_code, p.error,
             p.created_at, p.updated_at, p.started_at, p.completed_at, p.due_at, p.cancel_requested_at,
             (extract(epoch from p.completed_at) * 1000000)::bigint as ended
        from public.processing_jobs p where p.id = any (ids) order by p.created_at desc, p.id desc) j;
    texts := null;
    if jsonb_array_length(lookup -> 'texts') > 0 then
      -- Only what has not been read yet. mark says that what has been is still the same.
      select json_agg(json_build_object('job', t.job, 'ready', t.ready, 'chunks', t.chunks, 'mark', t.mark, 'since', t.since, 'text', (
          -- As public.partial_transcript, with what stands between two chunks before each of them.
          select string_agg(case when (select p.options ->> 'task' from public.processing_jobs p where p.id = t.job) = 'translate'
                   or coalesce(s.result ->> 'language', '') not in ('ja', 'lo', 'my', 'th', 'yue', 'zh') then ' ' else '' end
                   || (s.result ->> 'text'), '' order by s.index)
            from public.processing_job_chunks s
           where s.job_id = t.job and s.index >= t.since and s.index < t.ready and s.result ->> 'text' <> ''))) into texts
        from (
          select r.job, r.ready, r.chunks, r.mark,
                 case when r.ready >= r.known and r.known_mark is not distinct from r.given_mark then r.known else 0 end as since
            from (
              select (x ->> 'job')::uuid as job, (x ->> 'known')::integer as known, x ->> 'mark' as given_mark, c.ready, c.chunks,
                     (select max(m.completed_at)::text from public.processing_job_chunks m
                       where m.job_id = (x ->> 'job')::uuid and m.index < (x ->> 'known')::integer) as known_mark,
                     (select max(m.completed_at)::text from public.processing_job_chunks m
                       where m.job_id = (x ->> 'job')::uuid and m.index < c.ready) as mark
                from jsonb_array_elements(lookup -> 'texts') x cross join lateral (
                  select coalesce(min(o.index) filter (where o.completed_at is null), count(*))::integer as ready, count(*)::integer as chunks
                    from public.processing_job_chunks o where o.job_id = (x ->> 'job')::uuid) c) r) t;
    end if;
    each := each || json_build_object('running', running, 'jobs', jobs, 'texts', texts);
  end loop;
  answers := array_to_json(each);
end $$;
