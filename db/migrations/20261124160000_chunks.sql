-- Calls on other machines: their ids are here before anybody waits for them, and what they return is
-- here before anything is made of it. docs/decisions/0003-calls.md says why.

alter table public.processing_jobs add column usage jsonb;
comment on column public.processing_jobs.usage is
  'What the job''s calls took: calls, gpu_seconds, cpu_seconds, and their estimated_cost in the currency of the price list.';

create table pgscribe.preparations (
  job_id uuid primary key references public.processing_jobs (id) on delete cascade,
  call_id text,
  calls integer not null default 0,
  spawned_at timestamptz,
  plan jsonb,
  cpu_seconds double precision not null default 0,
  gpu_seconds double precision not null default 0
);
comment on table pgscribe.preparations is
  'The call that fetches, checks and decodes a job''s audio, and the plan of spans that it returned. call_id: the call that is to be waited for; null once the plan is here.';

create table public.processing_job_chunks (
  job_id uuid not null references public.processing_jobs (id) on delete cascade,
  index integer not null check (index >= 0),
  start_seconds double precision not null,
  end_seconds double precision not null check (end_seconds > start_seconds),
  status text not null generated always as (
    case when result is not null then 'completed' when call_id is not null then 'processing' else 'queued' end) stored,
  call_id text,
  calls integer not null default 0,
  spawned_at timestamptz,
  completed_at timestamptz,
  result jsonb,
  gpu_seconds double precision not null default 0,
  cpu_seconds double precision not null default 0,
  primary key (job_id, index)
);
comment on table public.processing_job_chunks is
  'Spans of a job''s audio, each transcribed by a call of its own. Those that are completed are never transcribed again.';
comment on column public.processing_job_chunks.job_id is 'The job.';
comment on column public.processing_job_chunks.index is 'The chunk''s place in the recording, from 0.';
comment on column public.processing_job_chunks.start_seconds is 'Where it starts in the recording.';
comment on column public.processing_job_chunks.end_seconds is 'Where it ends.';
comment on column public.processing_job_chunks.status is 'queued, processing or completed.';
comment on column public.processing_job_chunks.call_id is 'The call that is to be waited for.';
comment on column public.processing_job_chunks.calls is 'How many calls were started for it: one, unless some were lost.';
comment on column public.processing_job_chunks.spawned_at is 'When the last of them was started.';
comment on column public.processing_job_chunks.completed_at is 'When its result came.';
comment on column public.processing_job_chunks.result is 'Its transcript, in times from its own start.';
comment on column public.processing_job_chunks.gpu_seconds is 'What its calls took on machines with a GPU.';
comment on column public.processing_job_chunks.cpu_seconds is 'What they took on machines without.';

-- Calls that may still run, to be found for jobs that have ended.
create index processing_job_chunks_open_idx on public.processing_job_chunks (job_id) where status = 'processing';
create index preparations_open_idx on pgscribe.preparations (job_id) where call_id is not null;

alter table public.processing_job_chunks enable row level security;
create policy "Owners see the chunks of their jobs" on public.processing_job_chunks
  for select to authenticated
  using (exists (select from public.processing_jobs p where p.id = processing_job_chunks.job_id and p.user_id = (select auth.uid())));
revoke all on public.processing_job_chunks from public, anon, authenticated, service_role;
grant select (job_id, index, start_seconds, end_seconds, status, calls, spawned_at, completed_at, result, gpu_seconds, cpu_seconds)
  on public.processing_job_chunks to authenticated;
grant select on public.processing_job_chunks to service_role;

-- The fence ---------------------------------------------------------------------------------------------

create function pgscribe.hold_attempt(job uuid, attempt integer) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform from public.processing_jobs p
   where p.id = job and p.attempt = hold_attempt.attempt and p.status || '' = 'processing' for no key update;
  return found;
end $$;
comment on function pgscribe.hold_attempt is
  'Whether the attempt still holds its job; then it does so until the transaction ends.';

-- Calls -------------------------------------------------------------------------------------------------

create function pgscribe.load_calls(job uuid, attempt integer, out held boolean, out preparation jsonb, out chunks jsonb)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  held := pgscribe.hold_attempt(job, attempt);
  preparation := (select to_jsonb(r) from pgscribe.preparations r where r.job_id = job);
  chunks := (select jsonb_agg(jsonb_build_object(
      'index', c.index, 'call_id', c.call_id, 'calls', c.calls, 'result', c.result) order by c.index)
    from public.processing_job_chunks c where c.job_id = job);
end $$;
comment on function pgscribe.load_calls is 'What earlier attempts at a job have started and what came of it.';

create function pgscribe.note_call(job uuid, attempt integer, chunk integer, call text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  elsif chunk is null then
    insert into pgscribe.preparations as r (job_id, call_id, calls, spawned_at) values (job, call, 1, now())
    on conflict (job_id) do update set call_id = excluded.call_id, calls = r.calls + 1, spawned_at = now();
  else
    update public.processing_job_chunks c set call_id = call, calls = c.calls + 1, spawned_at = now()
     where c.job_id = job and c.index = chunk and c.result is null;
  end if;
  return true;
end $$;
comment on function pgscribe.note_call is
  'Notes a call that has been started, before anybody waits for it; chunk is null for the preparation. False: the attempt no longer holds its job.';

create function pgscribe.forget_call(job uuid, attempt integer, chunk integer, call text) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  elsif chunk is null then
    update pgscribe.preparations r set call_id = null where r.job_id = job and r.call_id = call;
  else
    update public.processing_job_chunks c set call_id = null where c.job_id = job and c.index = chunk and c.call_id = call;
  end if;
  return true;
end $$;
comment on function pgscribe.forget_call is 'Notes that a call will never return anything.';

create function pgscribe.store_plan(job uuid, attempt integer, plan jsonb, cpu_seconds double precision, gpu_seconds double precision)
returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  end if;
  insert into pgscribe.preparations as r (job_id, plan, cpu_seconds, gpu_seconds)
  values (job, store_plan.plan, store_plan.cpu_seconds, store_plan.gpu_seconds)
  on conflict (job_id) do update set call_id = null, plan = excluded.plan,
    cpu_seconds = r.cpu_seconds + excluded.cpu_seconds, gpu_seconds = r.gpu_seconds + excluded.gpu_seconds;
  -- After a second preparation the finished chunks stay as long as they are the same spans.
  delete from public.processing_job_chunks c where c.job_id = job and not exists (
    select from jsonb_array_elements(plan -> 'spans') with ordinality s (span, place)
     where s.place - 1 = c.index and c.start_seconds = (s.span ->> 'start')::float8 / 16000
       and c.end_seconds = (s.span ->> 'end')::float8 / 16000);
  insert into public.processing_job_chunks (job_id, index, start_seconds, end_seconds)
  select job, s.place - 1, (s.span ->> 'start')::float8 / 16000, (s.span ->> 'end')::float8 / 16000
    from jsonb_array_elements(plan -> 'spans') with ordinality s (span, place)
  on conflict do nothing;
  update public.processing_jobs p set audio_seconds = (plan ->> 'duration')::float8, updated_at = now() where p.id = job;
  return true;
end $$;
comment on function pgscribe.store_plan is 'Stores what the preparation returned: the spans become chunks, the length is known from now on.';

create function pgscribe.ready_chunks(job uuid) returns integer
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(min(c.index) filter (where c.result is null), count(*))::integer
    from public.processing_job_chunks c where c.job_id = job
$$;
comment on function pgscribe.ready_chunks is 'How many chunks from the start are completed: their text can be read already.';

create function pgscribe.store_chunk(
  job uuid, attempt integer, chunk integer, result jsonb, cpu_seconds double precision, gpu_seconds double precision)
returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  was_ready integer;
  ready integer;
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  end if;
  was_ready := pgscribe.ready_chunks(job);
  update public.processing_job_chunks c set result = store_chunk.result, call_id = null, completed_at = now(),
         cpu_seconds = c.cpu_seconds + store_chunk.cpu_seconds, gpu_seconds = c.gpu_seconds + store_chunk.gpu_seconds
   where c.job_id = job and c.index = chunk and c.result is null;
  ready := pgscribe.ready_chunks(job);
  if ready > was_ready then
    perform pg_notify('pgscribe_chunks', json_build_object('job_id', job, 'ready', ready)::text);
  end if;
  return true;
end $$;
comment on function pgscribe.store_chunk is 'Stores a chunk''s transcript; the first one stays. Notifies pgscribe_chunks of {"job_id", "ready"} where more of the text can be read now.';

create function pgscribe.forget_plan(job uuid, attempt integer) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  end if;
  update pgscribe.preparations r set plan = null where r.job_id = job;
  return true;
end $$;
comment on function pgscribe.forget_plan is 'Notes that the decoded audio is gone, so that it has to be prepared again; completed chunks stay.';

create function pgscribe.note_usage(job uuid, attempt integer, gpu_second_price double precision, cpu_second_price double precision)
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
              select r.calls, r.gpu_seconds, r.cpu_seconds from pgscribe.preparations r where r.job_id = job) u (calls, gpu, cpu))
   where p.id = job;
  return true;
end $$;
comment on function pgscribe.note_usage is 'Adds up what a job''s calls took, on its row.';

create function public.partial_transcript(job_id uuid, out ready integer, out chunks integer, out text text)
language sql stable security invoker set search_path = pg_catalog, pg_temp as $$
  select coalesce(min(c.index) filter (where c.result is null), count(*))::integer, count(*)::integer,
         (select string_agg(r.result ->> 'text', ' ' order by r.index) from public.processing_job_chunks r
           where r.job_id = partial_transcript.job_id and r.result ->> 'text' <> ''
             and not exists (select from public.processing_job_chunks e
                              where e.job_id = r.job_id and e.index < r.index and e.result is null))
    from public.processing_job_chunks c where c.job_id = partial_transcript.job_id
$$;
comment on function public.partial_transcript is
  'The text of a job that still runs, as far as it is complete from the start: of how many of its chunks, and of how many there are.';
revoke execute on function public.partial_transcript from public, anon;
grant execute on function public.partial_transcript to authenticated, service_role;

-- Calls that nobody waits for any more ----------------------------------------------------------------------

create table pgscribe.stray_calls (
  call_id text primary key,
  since timestamptz not null default now()
);
comment on table pgscribe.stray_calls is 'Calls of jobs that have ended or are gone; they are cancelled, and forgotten here.';

create function pgscribe.keep_stray_call() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  insert into pgscribe.stray_calls (call_id) values (old.call_id) on conflict do nothing;
  return null;
end $$;
create trigger keep_stray_call after delete on public.processing_job_chunks
  for each row when (old.call_id is not null) execute function pgscribe.keep_stray_call();
create trigger keep_stray_call after delete on pgscribe.preparations
  for each row when (old.call_id is not null) execute function pgscribe.keep_stray_call();

create function pgscribe.stray_calls(batch integer) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  ended uuid[];
begin
  ended := array(
    select p.id from public.processing_jobs p
     where p.id in (select c.job_id from public.processing_job_chunks c where c.status = 'processing'
                    union select r.job_id from pgscribe.preparations r where r.call_id is not null)
       and p.status not in ('queued', 'processing')
       for no key update of p skip locked);  -- none of them is claimed again meanwhile
  with chunks as (
    update public.processing_job_chunks c set call_id = null
      from public.processing_job_chunks o
     where o.job_id = c.job_id and o.index = c.index and c.job_id = any (ended) and c.status = 'processing'
    returning o.call_id),
  preparations as (
    update pgscribe.preparations r set call_id = null
      from pgscribe.preparations o
     where o.job_id = r.job_id and r.job_id = any (ended) and r.call_id is not null
    returning o.call_id)
  insert into pgscribe.stray_calls (call_id)
  select s.call_id from (select * from chunks union select * from preparations) s on conflict do nothing;
  return array(select s.call_id from pgscribe.stray_calls s order by s.since limit batch);
end $$;
comment on function pgscribe.stray_calls is 'Calls that are to be cancelled, with those of jobs that have ended meanwhile. Cancel them, then forget_stray_calls.';

create function pgscribe.forget_stray_calls(calls text[]) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  delete from pgscribe.stray_calls s where s.call_id = any (calls)
$$;
comment on function pgscribe.forget_stray_calls is 'Notes that these calls have been cancelled.';

-- Retention: chunks go with the queue jobs; the transcript is on the job's row.
create or replace function pgscribe.prune(what text, older_than interval, batch integer) returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  cutoff timestamptz := now() - older_than;
  since timestamptz;
  ids uuid[];
  reached timestamptz;
  pruned integer;
begin
  select pruned_until into since from pgscribe.retention where kind = what for update skip locked;
  if not found then  -- somebody else is at it
    return 0;
  end if;
  select array_agg(id), max(completed_at) into ids, reached from (
    select p.id, p.completed_at from public.processing_jobs p
     where p.completed_at >= since and p.completed_at < cutoff
       and case what when 'queue_jobs' then p.job_id is not null else p.status = what end
     order by p.completed_at limit batch for update of p skip locked) old;
  pruned := coalesce(cardinality(ids), 0);
  if what = 'queue_jobs' then
    delete from procrastinate.procrastinate_jobs q using public.processing_jobs p
     where p.id = any (ids) and q.id = p.job_id::bigint;
    delete from public.processing_job_chunks c where c.job_id = any (ids);
    delete from pgscribe.preparations r where r.job_id = any (ids);
    if pruned < batch then  -- those of another kind are few, and so are owners who are gone
      perform from pgscribe.fair_queue for update;
      delete from pgscribe.owner_shares s where not exists (select from auth.users u where u.id = s.owner_id);
      delete from procrastinate.procrastinate_jobs q
       where q.queue_name <> 'transcription' and q.status not in ('todo', 'doing') and not exists (
         select from procrastinate.procrastinate_events e where e.job_id = q.id and e.at >= cutoff);
    end if;
  else
    delete from public.processing_jobs p where p.id = any (ids);
  end if;
  -- An hour's overlap, for transactions that began before the cutoff and ended after this one.
  update pgscribe.retention set pruned_until =
      case pruned when batch then reached else greatest(since, cutoff - interval '1 hour') end
   where kind = what;
  return pruned;
end $$;

revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
