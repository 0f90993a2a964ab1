-- Operators: who they are, what they see of everybody's jobs, and what they may do. docs/operate.md says what the
-- numbers mean.
--
-- No policy is widened. The functions run as the tables' owner and ask first whether the caller is an operator.

create table pgscribe.operators (
  user_id uuid primary key references auth.users (id) on delete cascade,
  added_at timestamptz not null default now()
);
comment on table pgscribe.operators is
  'Users who see the queue and everybody''s jobs, without what was said in them, and may pause, cancel and retry. Made and removed with `pgscribe operators`; no API role has access.';
comment on column pgscribe.operators.user_id is 'The user.';
comment on column pgscribe.operators.added_at is 'Since when they are an operator.';
revoke all on pgscribe.operators from public, anon, authenticated, service_role;

alter table pgscribe.api_keys drop constraint api_keys_scopes_check, add constraint api_keys_scopes_check check (
  cardinality(scopes) > 0 and scopes <@ array['jobs:read', 'jobs:write', 'audio:read', 'audio:write', 'operate']
  and array_position(scopes, null) is null);

create function pgscribe.is_operator() returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from pgscribe.operators o join auth.users u on u.id = o.user_id
     where o.user_id = auth.uid() and u.deleted_at is null and (u.banned_until is null or u.banned_until <= now())
       and (auth.jwt() ->> 'pgscribe_key' is null or exists (
         select from pgscribe.api_keys k
          where k.id::text = auth.jwt() ->> 'pgscribe_key' and 'operate' = any (k.scopes) and k.revoked_at is null)))
$$;
comment on function pgscribe.is_operator is
  'Whether the caller is an operator now: in pgscribe.operators, not banned, and, if an API key acts for them, one that was made for that.';

create function pgscribe.require_operator() returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.is_operator() then
    raise insufficient_privilege using
      message = 'Only operators may do that', hint = 'Whoever runs pgscribe makes one: pgscribe operators add <user id or e-mail address>';
  end if;
end $$;
comment on function pgscribe.require_operator is 'Refuses whoever is no operator.';

create function public.is_operator() returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select pgscribe.is_operator()
$$;
comment on function public.is_operator is 'Whether you are an operator, and may call the functions whose names begin with operator_.';

-- Lists over all owners --------------------------------------------------------------------------------------
-- An index by time of all jobs would cost each of them three entries. What has gone wrong is little: only that is
-- indexed, and jobs that end well, and those that wait, get no entry more. Lists of everything are put together from
-- the owners' own lists.

create index processing_jobs_errors_idx on public.processing_jobs (error_code, created_at desc, id desc)
  where error_code is not null;
create index processing_jobs_not_completed_idx on public.processing_jobs (status, created_at desc, id desc)
  where status in ('failed', 'cancelled');

create type pgscribe.job_place as (id uuid, created_at timestamptz);
comment on type pgscribe.job_place is 'A job, and its place in a list.';

create function pgscribe.newest_jobs(
  status text, owner uuid, error_code text, most integer, after_at timestamptz, after_id uuid, ended_before timestamptz default null)
returns setof pgscribe.job_place
language plpgsql stable set search_path = pg_catalog, pg_temp
  set enable_seqscan = off set plan_cache_mode = force_custom_plan set jit = off as $$
#variable_conflict use_column
declare
  wanted text := newest_jobs.status;
  wanted_code text := newest_jobs.error_code;
begin
  after_id := case when after_at is null then 'ffffffff-ffff-ffff-ffff-ffffffffffff' else after_id end;
  after_at := coalesce(after_at, 'infinity');
  -- Written as they are, the other conditions leave the planner no index but the one of errors.
  if wanted_code is not null then
    return query
      select p.id, p.created_at from public.processing_jobs p
       where p.error_code = wanted_code and (p.created_at, p.id) < (after_at, after_id)
         and (ended_before is null or p.completed_at + interval '0 s' < ended_before)
         and (wanted is null or p.status || '' = wanted) and (owner is null or p.user_id::text = owner::text)
       order by p.created_at desc, p.id desc limit most;
  elsif owner is not null then
    return query
      select p.id, p.created_at from public.processing_jobs p
       where p.user_id = owner and (wanted is null or p.status = wanted) and (p.created_at, p.id) < (after_at, after_id)
         and (ended_before is null or p.completed_at + interval '0 s' < ended_before)
       order by p.created_at desc, p.id desc limit most;
  elsif wanted <> 'completed' then
    return query
      select p.id, p.created_at from public.processing_jobs p
       where p.status = wanted and (p.created_at, p.id) < (after_at, after_id)
         and (ended_before is null or p.completed_at + interval '0 s' < ended_before)
       order by p.created_at desc, p.id desc limit most;
  else
    -- So many jobs belong to no more owners than that: to those with the newest.
    return query
      with recursive owners as (
        (select p.user_id from public.processing_jobs p order by p.user_id limit 1)
        union all
        select (select p.user_id from public.processing_jobs p where p.user_id > o.user_id order by p.user_id limit 1)
          from owners o where o.user_id is not null),
      recent as (
        select o.user_id from owners o cross join lateral (
          select p.created_at, p.id from public.processing_jobs p
           where p.user_id = o.user_id and (wanted is null or p.status = wanted) and (p.created_at, p.id) < (after_at, after_id)
             and (ended_before is null or p.completed_at + interval '0 s' < ended_before)
           order by p.created_at desc, p.id desc limit 1) j
         order by j.created_at desc, j.id desc limit most)
      select j.id, j.created_at from recent o cross join lateral (
        select p.created_at, p.id from public.processing_jobs p
         where p.user_id = o.user_id and (wanted is null or p.status = wanted) and (p.created_at, p.id) < (after_at, after_id)
           and (ended_before is null or p.completed_at + interval '0 s' < ended_before)
         order by p.created_at desc, p.id desc limit most) j
       order by j.created_at desc, j.id desc limit most;
  end if;
end $$;
comment on function pgscribe.newest_jobs is
  'Some of all owners'' jobs, newest first: which they are, and when they were made. ended_before: only those that have ended, and before then.';

create function public.operator_jobs(
  with_status text default null, of_owner uuid default null, with_error_code text default null, "limit" integer default 50,
  after_created_at timestamptz default null, after_id uuid default null)
returns table (
  id uuid, owner_id uuid, email text, file_path text, options jsonb, status text, progress real, attempt integer,
  created_at timestamptz, started_at timestamptz, completed_at timestamptz, due_at timestamptz,
  audio_seconds double precision, error_code text, error text, usage jsonb)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform pgscribe.require_operator();
  return query
    select p.id, p.user_id, u.email::text, p.file_path, p.options - 'initial_prompt', p.status, p.progress, p.attempt,
           p.created_at, p.started_at, p.completed_at, p.due_at, p.audio_seconds, p.error_code, p.error, p.usage
      from pgscribe.newest_jobs(with_status, of_owner, with_error_code, least("limit", 1000), after_created_at, after_id) n
      join public.processing_jobs p on p.id = n.id left join auth.users u on u.id = p.user_id
     order by p.created_at desc, p.id desc;
end $$;
comment on function public.operator_jobs is
  'For operators: everybody''s jobs, newest first, at most 1000 at a time, without transcripts and prompts. For the next page pass created_at and id of the last row.';

-- Cancel and retry, many at a time ---------------------------------------------------------------------------

create function pgscribe.changeable_jobs(
  statuses text[], ids uuid[], owner uuid, code text, ended_before timestamptz default null) returns setof uuid
language sql stable set search_path = pg_catalog, pg_temp as $$
  select p.id from public.processing_jobs p
   where p.id = any (coalesce(ids, array(
           select n.id from unnest(statuses) s cross join lateral pgscribe.newest_jobs(s, owner, code, 2000, null, null, ended_before) n)))
     and p.status || '' = any (statuses) and (p.cancel_requested_at is null or p.completed_at is not null)
     and (ended_before is null or p.completed_at < ended_before)
$$;
comment on function pgscribe.changeable_jobs is
  'Jobs with one of these statuses that nobody has cancelled yet: of those with such ids, or the newest of such an owner with such an error. ended_before: only those that ended before then.';

create function pgscribe.hold_jobs(
  statuses text[], ids uuid[], owner uuid, code text, ended_before timestamptz default null) returns uuid[]
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set plan_cache_mode = force_custom_plan as $$
declare
  found_jobs uuid[] := array(select pgscribe.changeable_jobs(statuses, ids, owner, code, ended_before));
  queue_jobs bigint[];
  held_queue_jobs bigint[];
begin
  found_jobs := array(
    select p.id from public.processing_jobs p where p.id = any (found_jobs) and p.status || '' = any (statuses)
       and (ended_before is null or p.completed_at < ended_before)
     limit 1000 for update skip locked);
  queue_jobs := array(
    select q.id from public.processing_jobs p join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
     where p.id = any (found_jobs));
  held_queue_jobs := array(
    select q.id from procrastinate.procrastinate_jobs q where q.id = any (queue_jobs) for update skip locked);
  return array(
    select p.id from public.processing_jobs p
     where p.id = any (found_jobs)
       and (p.job_id is null or p.job_id::bigint = any (held_queue_jobs) or p.job_id::bigint <> all (queue_jobs)));
end $$;
comment on function pgscribe.hold_jobs is
  'Locks up to 1000 of the changeable jobs with their queue jobs and returns which; it waits for nobody.';

create function public.operator_cancel_jobs(
  ids uuid[] default null, with_status text default null, of_owner uuid default null, with_error_code text default null,
  out changed integer, out more boolean, out at timestamptz)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set lock_timeout = '2s' as $$
declare
  statuses text[] := array(select s from unnest(array['queued', 'processing']) s where s = coalesce(with_status, s));
  held uuid[];
begin
  perform pgscribe.require_operator();
  at := now();
  held := pgscribe.hold_jobs(statuses, ids, of_owner, with_error_code);
  changed := 0;
  -- On a busy server it does as many as there is time for.
  while changed < cardinality(held) and clock_timestamp() < statement_timestamp() + interval '4 s' loop
    update public.processing_jobs p set cancel_requested_at = now() where p.id = any (held[changed + 1:changed + 100]);
    changed := least(changed + 100, cardinality(held));
  end loop;
  more := exists (select pgscribe.changeable_jobs(statuses, ids, of_owner, with_error_code));
end $$;
comment on function public.operator_cancel_jobs is
  'For operators: cancels up to 1000 jobs: those with these ids, or those of such a status, owner and error. Returns how many, whether there are more (others, or some that somebody has locked or that there was no time for), and at what time.';

create function public.operator_retry_jobs(
  ids uuid[] default null, with_status text default null, of_owner uuid default null, with_error_code text default null,
  ended_before timestamptz default null, out changed integer, out more boolean, out refused integer, out at timestamptz)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp set lock_timeout = '500ms' as $$
declare
  statuses text[] := array(select s from unnest(array['failed', 'cancelled']) s where s = coalesce(with_status, s));
  held uuid[];
  job uuid;
  owner uuid;
  full_owners uuid[] := '{}';  -- they have as many jobs that wait as they may have
  busy_owners uuid[] := '{}';
begin
  perform pgscribe.require_operator();
  changed := 0;
  refused := 0;
  at := now();
  held := pgscribe.hold_jobs(statuses, ids, of_owner, with_error_code, ended_before);
  for job, owner in select p.id, p.user_id from public.processing_jobs p where p.id = any (held) order by p.created_at, p.id loop
    exit when clock_timestamp() > statement_timestamp() + interval '4 s';
    if owner = any (full_owners) then
      refused := refused + 1;
    elsif owner <> all (busy_owners) then
      begin
        update public.processing_jobs p set retry_requested_at = now() where p.id = job;
        changed := changed + 1;
      exception
        when sqlstate 'PT429' then
          full_owners := full_owners || owner;
          refused := refused + 1;
        when lock_not_available then
          busy_owners := busy_owners || owner;
      end;
    end if;
  end loop;
  more := exists (
    select from pgscribe.changeable_jobs(statuses, ids, of_owner, with_error_code, ended_before) c join public.processing_jobs p on p.id = c
     where p.user_id <> all (full_owners));
end $$;
comment on function public.operator_retry_jobs is
  'For operators: runs up to 1000 failed and cancelled jobs again, as operator_cancel_jobs chooses them. ended_before: only those that ended before then; with the `at` of the first call, no call of several retries a job twice. refused: those whose owners may have no more jobs that wait.';

-- Pauses ---------------------------------------------------------------------------------------------------------

create function public.operator_pause_queue() returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.require_operator();
  perform public.pause_queue();
end $$;
comment on function public.operator_pause_queue is 'For operators: starts no more jobs until operator_resume_queue; running ones go on.';

create function public.operator_resume_queue() returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.require_operator();
  perform public.resume_queue();
end $$;
comment on function public.operator_resume_queue is 'For operators: starts jobs again.';

create function public.operator_pause_owner(owner_id uuid) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.require_operator();
  if not exists (select from auth.users u where u.id = operator_pause_owner.owner_id) then
    return false;
  end if;
  perform public.pause_owner(operator_pause_owner.owner_id);
  return true;
end $$;
comment on function public.operator_pause_owner is
  'For operators: starts no more jobs of an owner until operator_resume_owner; running ones go on. False: there is no such user.';

create function public.operator_resume_owner(owner_id uuid) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.require_operator();
  if not exists (select from auth.users u where u.id = operator_resume_owner.owner_id) then
    return false;
  end if;
  perform public.resume_owner(operator_resume_owner.owner_id);
  return true;
end $$;
comment on function public.operator_resume_owner is 'For operators: starts jobs of an owner again. False: there is no such user.';

-- What each day took -----------------------------------------------------------------------------------------------
-- To add up two weeks of jobs takes a second or more. So a day that is over is added up once, and its jobs are not read
-- again; nothing is written as a job ends. What would be counted twice or not at all, as a job is tried again or
-- deleted, is an entry of its own.

create table pgscribe.daily_totals (
  day date not null,
  jobs bigint not null,
  audio_seconds double precision not null,
  gpu_seconds double precision not null,
  cpu_seconds double precision not null,
  estimated_cost double precision not null
);
create index daily_totals_day_idx on pgscribe.daily_totals (day);
comment on table pgscribe.daily_totals is
  'Entries that add up to what the jobs took that ended on a day (UTC): for days before pgscribe.open_day all of them, for later ones those that have been deleted since.';
comment on column pgscribe.daily_totals.day is 'The day on which the jobs ended, in UTC.';
comment on column pgscribe.daily_totals.jobs is 'How many they were; -1 takes one out that is tried again.';
comment on column pgscribe.daily_totals.audio_seconds is 'The audio of those that completed.';
comment on column pgscribe.daily_totals.gpu_seconds is 'What their calls took of GPUs.';
comment on column pgscribe.daily_totals.cpu_seconds is 'What their calls took of CPUs.';
comment on column pgscribe.daily_totals.estimated_cost is 'What that cost, at the prices that the workers were told.';

create table pgscribe.open_day (
  only_row boolean primary key default true check (only_row),
  day date not null
);
insert into pgscribe.open_day (day) values ((now() at time zone 'UTC')::date - 14);
comment on table pgscribe.open_day is 'One row: the first day that has not been added up yet.';
comment on column pgscribe.open_day.only_row is 'True.';
comment on column pgscribe.open_day.day is 'That day, in UTC.';

create function pgscribe.jobs_took(since timestamptz, until timestamptz) returns setof pgscribe.daily_totals
language plpgsql stable set search_path = pg_catalog, pg_temp
  set enable_seqscan = off set plan_cache_mode = force_custom_plan set jit = off as $$
begin
  return query
    select (p.completed_at at time zone 'UTC')::date, count(*), coalesce(sum(p.audio_seconds) filter (where p.status = 'completed'), 0),
           coalesce(sum((p.usage ->> 'gpu_seconds')::float8), 0), coalesce(sum((p.usage ->> 'cpu_seconds')::float8), 0),
           coalesce(sum((p.usage ->> 'estimated_cost')::float8), 0)
      from public.processing_jobs p where p.completed_at >= since and p.completed_at < until group by 1;
end $$;
comment on function pgscribe.jobs_took is 'What the jobs took that ended then, day by day.';

create function pgscribe.close_day() returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  closing date;
begin
  -- Whoever retries or deletes jobs shares this lock until the end of their transaction. It is tried again in a minute.
  if not pg_try_advisory_xact_lock(hashtextextended('pgscribe days', 0)) then
    return false;
  end if;
  -- An hour's grace, for transactions that began before midnight.
  update pgscribe.open_day o set day = o.day + 1
   where (o.day + 1)::timestamp at time zone 'UTC' < now() - interval '1 hour' returning o.day - 1 into closing;
  if closing is null then
    return false;
  end if;
  with entries as (delete from pgscribe.daily_totals t where t.day = closing returning t.*)
  insert into pgscribe.daily_totals
  select closing, sum(a.jobs), sum(a.audio_seconds), sum(a.gpu_seconds), sum(a.cpu_seconds), sum(a.estimated_cost)
    from (select * from entries
          union all
          select * from pgscribe.jobs_took(closing::timestamp at time zone 'UTC', (closing + 1)::timestamp at time zone 'UTC')) a
  having count(*) > 0;
  return true;
end $$;
comment on function pgscribe.close_day is 'Adds up the oldest day that is over and has not been added up; returns whether there was one.';

create function pgscribe.keep_day_of_retried() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pg_advisory_xact_lock_shared(hashtextextended('pgscribe days', 0));
  insert into pgscribe.daily_totals
  select d.day, -1, case old.status when 'completed' then -coalesce(old.audio_seconds, 0) else 0 end,
         -coalesce((old.usage ->> 'gpu_seconds')::float8, 0), -coalesce((old.usage ->> 'cpu_seconds')::float8, 0),
         -coalesce((old.usage ->> 'estimated_cost')::float8, 0)
    from (select (old.completed_at at time zone 'UTC')::date as day) d join pgscribe.open_day o on d.day < o.day;
  return null;
end $$;
comment on function pgscribe.keep_day_of_retried is 'A job that is tried again counts on the day on which it ends at last, with all that it took.';
create trigger keep_day_of_retried after update of completed_at on public.processing_jobs
  for each row when (old.completed_at is not null and new.completed_at is null) execute function pgscribe.keep_day_of_retried();

create function pgscribe.keep_day_of_deleted() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if exists (select from old_rows where completed_at is not null) then
    perform pg_advisory_xact_lock_shared(hashtextextended('pgscribe days', 0));
    insert into pgscribe.daily_totals
    select (r.completed_at at time zone 'UTC')::date, count(*), coalesce(sum(r.audio_seconds) filter (where r.status = 'completed'), 0),
           coalesce(sum((r.usage ->> 'gpu_seconds')::float8), 0), coalesce(sum((r.usage ->> 'cpu_seconds')::float8), 0),
           coalesce(sum((r.usage ->> 'estimated_cost')::float8), 0)
      from old_rows r where (r.completed_at at time zone 'UTC')::date >= (select o.day from pgscribe.open_day o) group by 1;
  end if;
  return null;
end $$;
comment on function pgscribe.keep_day_of_deleted is 'What a job took stays counted when it is deleted.';
create trigger keep_day_of_deleted after delete on public.processing_jobs
  referencing old table as old_rows for each statement execute function pgscribe.keep_day_of_deleted();

-- Workers of any version call this once a minute.
create or replace function pgscribe.add_up_usage() returns integer
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select pgscribe.close_day();
  with news as (delete from pgscribe.usage_news returning *),
  added as (
    insert into pgscribe.owner_usage as u (owner_id, month, audio_seconds, jobs)
    select owner_id, month, sum(audio_seconds), sum(jobs) from news group by 1, 2 order by 1, 2
    on conflict (owner_id, month) do update set
      audio_seconds = u.audio_seconds + excluded.audio_seconds, jobs = u.jobs + excluded.jobs)
  select count(*)::integer from news
$$;
comment on function pgscribe.add_up_usage is
  'Adds what jobs have used since the last time to pgscribe.owner_usage, and what a day took that is over to pgscribe.daily_totals; returns of how many entries of usage.';

create function pgscribe.daily_costs() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  with days as (
    select d::date as day, o.day as open_day
      from pgscribe.open_day o, (select (now() at time zone 'UTC')::date as today) t, generate_series(t.today - 13, t.today, interval '1 day') d),
  entries as (
    select t.* from pgscribe.daily_totals t where t.day >= (select min(day) from days)
    union all
    select j.* from pgscribe.jobs_took((select greatest(min(day), min(open_day)) from days)::timestamp at time zone 'UTC', 'infinity') j)
  select jsonb_agg(jsonb_build_object(
           'day', t.day, 'jobs', t.jobs, 'audio_seconds', t.audio_seconds, 'gpu_seconds', round(t.gpu_seconds::numeric, 3),
           'cpu_seconds', round(t.cpu_seconds::numeric, 3), 'estimated_cost', round(t.estimated_cost::numeric, 6)) order by t.day)
    from (select d.day, coalesce(sum(e.jobs), 0) as jobs, coalesce(sum(e.audio_seconds), 0) as audio_seconds,
                 coalesce(sum(e.gpu_seconds), 0) as gpu_seconds, coalesce(sum(e.cpu_seconds), 0) as cpu_seconds,
                 coalesce(sum(e.estimated_cost), 0) as estimated_cost
            from days d left join entries e on e.day = d.day group by d.day) t
$$;
comment on function pgscribe.daily_costs is 'What the jobs took that ended on each of the last 14 days (UTC).';

-- Overview -----------------------------------------------------------------------------------------------------------

create function pgscribe.overview_of_workers(stall_timeout double precision) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_agg(jsonb_build_object(
           'id', w.id, 'last_heartbeat', w.last_heartbeat,
           'alive', w.last_heartbeat > now() - make_interval(secs => stall_timeout), 'running', r.running,
           'holds', coalesce(r.holds, '[]')) order by w.last_heartbeat desc, w.id), '[]')
    from (select * from procrastinate.procrastinate_workers order by last_heartbeat desc limit 200) w
   cross join lateral (
     select count(*) as running,
            jsonb_agg(jsonb_build_object(
              'job_id', h.id, 'owner_id', h.user_id, 'email', h.email, 'file_path', h.file_path, 'started_at', h.started_at,
              'progress', h.progress, 'attempt', h.attempt) order by h.number) filter (where h.number <= 100) as holds
       from (select p.*, u.email, row_number() over (order by p.started_at, p.id) as number
               from procrastinate.procrastinate_jobs q join public.processing_jobs p on p.job_id = q.id::text
               left join auth.users u on u.id = p.user_id
              where q.worker_id = w.id and q.status = 'doing') h) r
$$;
comment on function pgscribe.overview_of_workers is
  'The 200 workers that were heard of last, with the first 100 of the jobs that each holds; alive: heard of within stall_timeout seconds.';

create function pgscribe.overview_of_jobs(since timestamptz, step interval) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp
  set enable_seqscan = off set plan_cache_mode = force_custom_plan set jit = off set work_mem = '32MB' as $$
begin
  return (
    with ended as materialized (  -- by bucket and status, by owner, by error and status, in one pass
      select p.at, p.user_id, p.error_code, p.status, count(*) as jobs, max(p.completed_at) as last_at, sum(p.seconds) as seconds
        from (
          select date_bin(step, e.completed_at, since) as at, e.user_id, e.error_code, e.status, e.completed_at,
                 case e.status when 'completed' then coalesce(e.audio_seconds, 0) else 0 end as seconds
            from public.processing_jobs e where e.completed_at >= since) p
       group by grouping sets ((p.at, p.status), (p.user_id), (p.error_code, p.status))),
    live as materialized (
      select p.user_id, p.status, p.due_at > now() as later, coalesce(p.audio_seconds, p.estimated_seconds, 0) as seconds,
             greatest(p.created_at, p.scheduled_at, p.retry_requested_at) as since
        from public.processing_jobs p where p.status = 'queued'
      union all
      select p.user_id, p.status, null, coalesce(p.audio_seconds, p.estimated_seconds, 0), null
        from public.processing_jobs p where p.status = 'processing'),
    buckets as (
      select b.at, coalesce(sum(e.jobs) filter (where e.status = 'completed'), 0) as completed,
             coalesce(sum(e.jobs) filter (where e.status = 'failed'), 0) as failed,
             coalesce(sum(e.jobs) filter (where e.status = 'cancelled'), 0) as cancelled, coalesce(sum(e.seconds), 0) as seconds
        from generate_series(since, now(), step) b (at) left join ended e on e.at = b.at
       group by b.at),
    sample as (
      select case when e.attempt = 1 then extract(epoch from e.started_at - greatest(e.created_at, e.scheduled_at)) end as waited,
             case when e.status = 'completed' then extract(epoch from e.completed_at - e.started_at) end as ran, e.audio_seconds
        from public.processing_jobs e where e.completed_at >= since order by e.completed_at desc limit 10000),
    times as (
      select percentile_cont(array[0.5, 0.95]) within group (order by greatest(waited, 0)) filter (where waited is not null) as waited,
             percentile_cont(array[0.5, 0.95]) within group (order by ran) filter (where ran is not null) as ran,
             percentile_cont(0.5) within group (order by audio_seconds / nullif(ran, 0)) filter (where ran > 0) as factor,
             count(*) as jobs
        from sample),
    failures as (
      select e.error_code, e.jobs, e.last_at, (
               select left(p.error, 1000) from public.processing_jobs p
                where p.completed_at = e.last_at and p.error_code = e.error_code and p.status || '' = 'failed' limit 1) as example
        from ended e where e.at is null and e.user_id is null and e.status = 'failed'
       order by e.jobs desc, e.error_code limit 50),
    active as (
      select user_id, sum(queued) as queued, sum(processing) as processing, sum(waiting) as waiting, sum(done) as done
        from (
          select l.user_id, count(*) filter (where l.status = 'queued' and l.later is not true) as queued,
                 count(*) filter (where l.status = 'processing') as processing,
                 coalesce(sum(l.seconds) filter (where l.status = 'queued' and l.later is not true), 0) as waiting, 0::float8 as done
            from live l group by l.user_id
          union all
          select e.user_id, 0, 0, 0, e.seconds from ended e where e.user_id is not null
          union all
          select o.owner_id, 0, 0, 0, 0 from pgscribe.owner_limits o where o.paused_at is not null) a
       group by user_id),
    owners as (
      select a.*, u.email, coalesce(o.weight, 1) as weight, coalesce(o.max_running, s.max_running_per_owner) as max_running, o.paused_at,
             a.done / nullif(sum(a.done) over (), 0) as share,
             row_number() over (order by a.waiting + a.done desc, a.processing desc, a.queued desc, a.user_id) as place
        from active a join pgscribe.queue_settings s on s.queue_name = 'transcription'
        left join pgscribe.owner_limits o on o.owner_id = a.user_id
        left join auth.users u on u.id = a.user_id)
    select jsonb_build_object(
      'queue', (select jsonb_build_object(
          'paused_at', (select s.paused_at from pgscribe.queue_settings s where s.queue_name = 'transcription'),
          'states', jsonb_build_object(
            'queued', count(*) filter (where l.status = 'queued' and l.later is not true),
            'scheduled', count(*) filter (where l.later),
            'processing', count(*) filter (where l.status = 'processing')),
          'oldest_queued_seconds', extract(epoch from now() - min(l.since) filter (where l.later is not true)),
          'queued_audio_seconds', coalesce(sum(l.seconds) filter (where l.status = 'queued' and l.later is not true), 0)) from live l),
      'ended', (select jsonb_build_object('completed', sum(b.completed), 'failed', sum(b.failed), 'cancelled', sum(b.cancelled),
                  'audio_seconds', sum(b.seconds)) from buckets b),
      'throughput', (select jsonb_agg(jsonb_build_object('at', b.at, 'completed', b.completed, 'failed', b.failed,
                       'cancelled', b.cancelled, 'audio_seconds', b.seconds) order by b.at) from buckets b),
      'times', (select jsonb_build_object('jobs', t.jobs, 'wait', jsonb_build_object('p50', t.waited[1], 'p95', t.waited[2]),
                  'run', jsonb_build_object('p50', t.ran[1], 'p95', t.ran[2]),
                  'real_time_factor', jsonb_build_object('p50', t.factor)) from times t),
      'failures', (select coalesce(jsonb_agg(jsonb_build_object('error_code', f.error_code, 'jobs', f.jobs, 'last_at', f.last_at,
                     'example', f.example) order by f.jobs desc, f.error_code), '[]') from failures f),
      'owners', (select coalesce(jsonb_agg(jsonb_build_object('owner_id', o.user_id, 'email', o.email, 'queued', o.queued,
                   'processing', o.processing, 'waiting_audio_seconds', o.waiting, 'share', coalesce(o.share, 0),
                   'audio_seconds', o.done, 'weight', o.weight, 'max_running', o.max_running, 'paused_at', o.paused_at) order by o.place), '[]')
                   from (select * from owners where place <= 50 or paused_at is not null order by place limit 100) o)));
end $$;
comment on function pgscribe.overview_of_jobs is
  'What waits and runs, and what ended since then, in steps: the part of public.operator_overview that is made of jobs.';

create function public.operator_overview(hours integer default 24, stall_timeout double precision default 30) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  step interval := (
    select min(s) from unnest(array['1 min', '2 min', '5 min', '10 min', '15 min', '30 min', '1 hour', '2 hours', '3 hours',
      '4 hours', '6 hours', '8 hours', '12 hours']::interval[]) s where s * 60 >= make_interval(hours => hours));
  since timestamptz := date_bin(step, now() - make_interval(hours => hours), '2000-01-01 00:00+00');
begin
  perform pgscribe.require_operator();
  if (hours between 1 and 720) is not true then
    raise invalid_parameter_value using message = 'hours: must be from 1 to 720';
  end if;
  return jsonb_build_object('now', now(), 'hours', hours, 'since', since, 'bucket_seconds', extract(epoch from step))
    || pgscribe.overview_of_jobs(since, step)
    || jsonb_build_object('workers', pgscribe.overview_of_workers(stall_timeout), 'costs', pgscribe.daily_costs());
end $$;
comment on function public.operator_overview is
  'For operators: the queue, its workers and owners now, what ended in the last so many hours (1 to 720), and what each of the last 14 days took. stall_timeout: seconds after which a worker that has not been heard of is not alive.';

revoke execute on function
  public.is_operator, public.operator_jobs, public.operator_cancel_jobs, public.operator_retry_jobs, public.operator_overview,
  public.operator_pause_queue, public.operator_resume_queue, public.operator_pause_owner, public.operator_resume_owner
  from public, anon, authenticated, service_role;
grant execute on function
  public.is_operator, public.operator_jobs, public.operator_cancel_jobs, public.operator_retry_jobs, public.operator_overview,
  public.operator_pause_queue, public.operator_resume_queue, public.operator_pause_owner, public.operator_resume_owner
  to authenticated;
revoke all on pgscribe.daily_totals, pgscribe.open_day from public, anon, authenticated, service_role;
revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
-- An index's expression runs as whoever changes the row, be it to cancel a job that has completed.
grant execute on function pgscribe.search_document(uuid, jsonb) to authenticated, service_role;
