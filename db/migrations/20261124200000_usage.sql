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

-- Decoded audio that nobody reads any more ------------------------------------------------------------------

create table pgscribe.stray_audio (
  job_id uuid primary key,
  since timestamptz not null default now()
);
comment on table pgscribe.stray_audio is 'Jobs that have failed or were cancelled while their decoded audio was there; it is deleted, and forgotten here.';

create function pgscribe.keep_stray_audio() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  insert into pgscribe.stray_audio (job_id)
  select r.job_id from pgscribe.preparations r where r.job_id = new.id and r.plan is not null on conflict do nothing;
  return null;
end $$;
create trigger keep_stray_audio after update of status on public.processing_jobs
  for each row when (old.status = 'processing' and new.status in ('failed', 'cancelled')) execute function pgscribe.keep_stray_audio();

create function pgscribe.stray_audio(batch integer) returns uuid[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  wanted uuid[];
  ended uuid[];
begin
  wanted := array(select s.job_id from pgscribe.stray_audio s order by s.since limit batch for update skip locked);
  ended := array(select p.id from public.processing_jobs p
    where p.id = any (wanted) and p.status in ('failed', 'cancelled') for no key update of p);
  -- Those that were retried meanwhile go on with what is there.
  delete from pgscribe.stray_audio s where s.job_id = any (wanted) and s.job_id <> all (ended);
  -- Those that are retried from now on have theirs decoded again.
  update pgscribe.preparations r set plan = null where r.job_id = any (ended) and r.plan is not null;
  return ended;
end $$;
comment on function pgscribe.stray_audio is 'Jobs whose decoded audio is to be deleted. Delete it, then forget_stray_audio.';

create function pgscribe.forget_stray_audio(jobs uuid[]) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  delete from pgscribe.stray_audio s where s.job_id = any (jobs)
$$;
comment on function pgscribe.forget_stray_audio is 'Notes that the decoded audio of these jobs has been deleted.';

revoke execute on function pgscribe.fail_call, pgscribe.keep_stray_audio, pgscribe.stray_audio, pgscribe.forget_stray_audio
  from public, anon, authenticated, service_role;
