-- What calls took is known also of those that failed, and decoded audio goes with its job.

create or replace function pgscribe.note_call(job uuid, attempt integer, chunk integer, call text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  elsif chunk is null then
    insert into pgscribe.preparations as r (job_id, call_id, calls, spawned_at) values (job, call, 1, now())
    on conflict (job_id) do update set call_id = excluded.call_id, calls = r.calls + 1, spawned_at = now()
     where r.call_id is distinct from excluded.call_id;
  else
    update public.processing_job_chunks c set call_id = call, calls = c.calls + 1, spawned_at = now()
     where c.job_id = job and c.index = chunk and c.result is null and c.call_id is distinct from call;
  end if;
  return true;
end $$;
comment on function pgscribe.note_call is
  'Notes a call that has been started, before anybody waits for it; chunk is null for the preparation. Doing it again changes nothing. False: the attempt no longer holds its job.';

create function pgscribe.fail_call(
  job uuid, attempt integer, chunk integer, call text, cpu_seconds double precision, gpu_seconds double precision)
returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  elsif chunk is null then
    update pgscribe.preparations r set call_id = null,
           cpu_seconds = r.cpu_seconds + fail_call.cpu_seconds, gpu_seconds = r.gpu_seconds + fail_call.gpu_seconds
     where r.job_id = job and r.call_id = call;
  else
    update public.processing_job_chunks c set call_id = null,
           cpu_seconds = c.cpu_seconds + fail_call.cpu_seconds, gpu_seconds = c.gpu_seconds + fail_call.gpu_seconds
     where c.job_id = job and c.index = chunk and c.call_id = call;
  end if;
  return true;
end $$;
comment on function pgscribe.fail_call is 'Notes that a call has returned an error, and what it took.';

create or replace function pgscribe.note_usage(job uuid, attempt integer, gpu_second_price double precision, cpu_second_price double precision)
returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  end if;
  update public.processing_jobs p set updated_at = now(), usage = (
      select jsonb_build_object('calls', sum(u.calls), 'gpu_seconds', round(sum(u.gpu)::numeric, 3),
               'cpu_seconds', round(sum(u.cpu)::numeric, 3),
               'estimated_cost', round((sum(u.gpu) * gpu_second_price + sum(u.cpu) * cpu_second_price)::numeric, 6))
        from (select c.calls, c.gpu_seconds, c.cpu_seconds from public.processing_job_chunks c where c.job_id = job
              union all
              select r.calls, r.gpu_seconds, r.cpu_seconds from pgscribe.preparations r where r.job_id = job) u (calls, gpu, cpu)
      having count(*) > 0)
   where p.id = job;
  return true;
end $$;
comment on function pgscribe.note_usage is 'Adds up what a job''s calls took, on its row: nothing where there was none.';

-- As modal_functions.transcript.join_text: some languages put nothing between words.
create or replace function public.partial_transcript(job_id uuid, out ready integer, out chunks integer, out text text)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
  with own as (
    select c.index, c.result from public.processing_job_chunks c where c.job_id = partial_transcript.job_id),
  counted as (
    select coalesce(min(o.index) filter (where o.result is null), count(*))::integer as ready, count(*)::integer as chunks from own o),
  spoken as (
    select o.index, o.result ->> 'text' as text, o.result ->> 'language' as language
      from own o, counted n where o.index < n.ready and o.result ->> 'text' <> '')
  select n.ready, n.chunks, (
    select string_agg(s.text, case when (select p.options ->> 'task' from public.processing_jobs p where p.id = partial_transcript.job_id) = 'translate'
        or coalesce(s.language, '') not in ('ja', 'lo', 'my', 'th', 'yue', 'zh') then ' ' else '' end order by s.index) from spoken s)
    from counted n
$$;

-- Decoded audio ----------------------------------------------------------------------------------------------

alter table pgscribe.preparations add column audio text;
comment on column pgscribe.preparations.audio is 'The file that the plan was made of, as long as somebody may read it.';
update pgscribe.preparations set audio = plan ->> 'pcm';

create table pgscribe.stray_audio (
  audio text primary key,
  since timestamptz not null default now()
);
comment on table pgscribe.stray_audio is 'Files of decoded audio that nobody reads any more; they are deleted, and forgotten here.';

create function pgscribe.store_plan(
  job uuid, attempt integer, call text, plan jsonb, cpu_seconds double precision, gpu_seconds double precision)
returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  stored pgscribe.preparations;
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  end if;
  select * into stored from pgscribe.preparations r where r.job_id = job and r.call_id = call;
  if stored.job_id is null then  -- it was stored already, and the answer got lost
    return true;
  end if;
  insert into pgscribe.stray_audio (audio) select stored.audio where stored.audio <> store_plan.plan ->> 'pcm' on conflict do nothing;
  update pgscribe.preparations r set call_id = null, plan = store_plan.plan, audio = store_plan.plan ->> 'pcm',
         cpu_seconds = r.cpu_seconds + store_plan.cpu_seconds, gpu_seconds = r.gpu_seconds + store_plan.gpu_seconds
   where r.job_id = job;
  -- After a second preparation the finished chunks stay as long as they are the same spans.
  delete from public.processing_job_chunks c where c.job_id = job and not exists (
    select from jsonb_array_elements(store_plan.plan -> 'spans') with ordinality s (span, place)
     where s.place - 1 = c.index and c.start_seconds = (s.span ->> 'start')::float8 / 16000
       and c.end_seconds = (s.span ->> 'end')::float8 / 16000);
  insert into public.processing_job_chunks (job_id, index, start_seconds, end_seconds)
  select job, s.place - 1, (s.span ->> 'start')::float8 / 16000, (s.span ->> 'end')::float8 / 16000
    from jsonb_array_elements(store_plan.plan -> 'spans') with ordinality s (span, place)
  on conflict do nothing;
  update public.processing_jobs p set audio_seconds = (store_plan.plan ->> 'duration')::float8, updated_at = now() where p.id = job;
  return true;
end $$;
comment on function pgscribe.store_plan(uuid, integer, text, jsonb, double precision, double precision) is
  'Stores what a preparation''s call returned: the spans become chunks, the length is known from now on. Doing it again changes nothing.';

-- For workers of the version before.
create or replace function pgscribe.store_plan(job uuid, attempt integer, plan jsonb, cpu_seconds double precision, gpu_seconds double precision)
returns boolean
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select pgscribe.store_plan(job, attempt, (select r.call_id from pgscribe.preparations r where r.job_id = job), plan, cpu_seconds, gpu_seconds)
$$;

create or replace function pgscribe.forget_plan(job uuid, attempt integer) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  end if;
  update pgscribe.preparations r set plan = null, audio = null where r.job_id = job;
  return true;
end $$;

create function pgscribe.forget_audio(job uuid, attempt integer) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  end if;
  insert into pgscribe.stray_audio (audio) select r.audio from pgscribe.preparations r
   where r.job_id = job and r.audio is not null on conflict do nothing;
  update pgscribe.preparations r set audio = null where r.job_id = job;
  return true;
end $$;
comment on function pgscribe.forget_audio is 'Notes that all chunks are done: the decoded audio is to be deleted.';

create function pgscribe.release_calls(job uuid, attempt integer, known text[], out held boolean, out calls text[], out audio text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  held := pgscribe.hold_attempt(job, attempt);
  if not held then
    calls := array(select s.call_id from pgscribe.stray_calls s where s.call_id = any (known));
    return;
  end if;
  select r.audio, array_remove(array_agg(c.call_id) || r.call_id, null) into audio, calls
    from pgscribe.preparations r left join public.processing_job_chunks c on c.job_id = r.job_id
   where r.job_id = job group by r.job_id;
  update public.processing_job_chunks c set call_id = null where c.job_id = job and c.call_id is not null;
  update pgscribe.preparations r set call_id = null, plan = null, audio = null where r.job_id = job;
  insert into pgscribe.stray_calls (call_id) select unnest(calls) on conflict do nothing;
  insert into pgscribe.stray_audio (audio) select release_calls.audio where release_calls.audio is not null on conflict do nothing;
end $$;
comment on function pgscribe.release_calls is
  'Gives up what an attempt that ends for good has running: these calls and this file are nobody''s any more. Cancel and delete them, then forget_stray_calls and forget_stray_audio. Where the attempt no longer holds its job, as that is deleted, it returns which of the calls that it knows are nobody''s.';

create function pgscribe.keep_stray_audio() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if tg_op = 'DELETE' then
    insert into pgscribe.stray_audio (audio) values (old.audio) on conflict do nothing;
  else  -- whoever retries the job has its audio decoded again, to another file
    insert into pgscribe.stray_audio (audio) select r.audio from pgscribe.preparations r
     where r.job_id = new.id and r.audio is not null on conflict do nothing;
    update pgscribe.preparations r set plan = null, audio = null where r.job_id = new.id and r.audio is not null;
  end if;
  return null;
end $$;
create trigger keep_stray_audio after update of status on public.processing_jobs
  for each row when (new.status in ('failed', 'cancelled') and old.status in ('queued', 'processing'))
  execute function pgscribe.keep_stray_audio();
create trigger keep_stray_audio after delete on pgscribe.preparations
  for each row when (old.audio is not null) execute function pgscribe.keep_stray_audio();

create function pgscribe.stray_audio(batch integer) returns text[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  select array(select s.audio from pgscribe.stray_audio s order by s.since limit batch)
$$;
comment on function pgscribe.stray_audio is 'Files of decoded audio that are to be deleted. Delete them, then forget_stray_audio.';

create function pgscribe.forget_stray_audio(files text[]) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  delete from pgscribe.stray_audio s where s.audio = any (files)
$$;
comment on function pgscribe.forget_stray_audio is 'Notes that these files have been deleted.';

revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
