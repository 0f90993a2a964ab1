-- Audio by URL, webhooks, limits per owner, deletion. docs/limits.md says how the limits count.
--
-- Nothing here adds a lock that two owners share: what all write to only grows, and is added up later.

-- Audio by URL, and who is told ------------------------------------------------------------------------

alter table public.processing_jobs add column audio_url text, add column webhook_url text;
comment on column public.processing_jobs.audio_url is
  'Where the worker fetches the audio to file_path, unless that is there: http or https, at most 2048 characters.';
comment on column public.processing_jobs.webhook_url is 'Who is told once the job has ended: http or https, at most 2048 characters.';
comment on table public.processing_jobs is
  'Transcription jobs. Insert a row to start one; everything but user_id, file_path, audio_url, webhook_url, options, scheduled_at, priority, idempotency_key and max_attempts is written by pgscribe.';
grant insert (audio_url, webhook_url) on public.processing_jobs to authenticated, service_role;

create function pgscribe.check_url(field text, url text) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  if length(url) > 2048 or url !~ '^https?://[^][/@?#[:space:][:cntrl:]\\]+([/?#][^[:space:][:cntrl:]\\]*)?$'
      and url !~ '^https?://\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?([/?#][^[:space:][:cntrl:]\\]*)?$' then
    perform pgscribe.reject(field, 'must be an http or https URL of at most 2048 characters without user name, password, spaces, backslashes or control characters',
      'Percent-encode what a URL can''t hold, as in https://example.org/my%20talk.mp3.');
  end if;
end $$;
comment on function pgscribe.check_url is 'Refuses what is no plain http(s) URL. Where it may lead is checked by who connects.';

create or replace function pgscribe.check_processing_job() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  first public.processing_jobs;
begin
  if (new.job_id, new.started_at, new.completed_at, new.audio_seconds, new.result, new.error_code, new.error,
      new.due_at, new.cancel_requested_at, new.retry_requested_at) is distinct from
      (null::text, null::timestamptz, null::timestamptz, null::float8, null::jsonb, null::text, null::text,
       null::timestamptz, null::timestamptz, null::timestamptz)
      or (new.status, new.progress, new.attempt) is distinct from ('queued'::text, 0::real, 0) then
    perform pgscribe.reject('status', 'only pgscribe writes status, progress, attempt, result, error and the times',
      'Insert user_id, file_path, audio_url, webhook_url, options, scheduled_at, priority, idempotency_key and max_attempts.');
  end if;
  if new.scheduled_at not between '2000-01-01' and now() + interval '1 year' then
    perform pgscribe.reject('scheduled_at', 'must be at most a year ahead', 'Leave it out to start at once.');
  end if;
  if new.priority not between -100 and 100 then
    perform pgscribe.reject('priority', 'must be from -100 to 100, not ' || new.priority, 'Leave it out for 0.');
  end if;
  if new.max_attempts not between 1 and 20 then
    perform pgscribe.reject('max_attempts', 'must be from 1 to 20, not ' || new.max_attempts, 'Leave it out for the default.');
  end if;
  if length(new.idempotency_key) not between 1 and 200 then
    perform pgscribe.reject('idempotency_key', 'must have 1 to 200 characters', 'A UUID will do.');
  end if;
  perform pgscribe.check_file_path(new.file_path);
  perform pgscribe.check_options(new.options);
  if new.audio_url is not null then
    perform pgscribe.check_url('audio_url', new.audio_url);
  end if;
  if new.webhook_url is not null then
    perform pgscribe.check_url('webhook_url', new.webhook_url);
  end if;
  -- Other users' keys are none of the caller's business; row level security refuses the row then.
  if new.idempotency_key is not null and coalesce(auth.uid(), new.user_id) = new.user_id then
    select * into first from public.processing_jobs p
     where p.user_id = new.user_id and p.idempotency_key = new.idempotency_key;
    if first.id is not null
        and (first.file_path, first.options, first.scheduled_at, first.priority, first.max_attempts, first.audio_url, first.webhook_url)
        is distinct from (new.file_path, new.options, new.scheduled_at, new.priority, new.max_attempts, new.audio_url, new.webhook_url) then
      perform pgscribe.reject('idempotency_key', 'was used for another job, with other values',
        'Send what was sent first, or use another key.');
    end if;
  end if;
  new.due_at := case when new.scheduled_at > now() then new.scheduled_at end;
  new.estimated_seconds := coalesce(new.estimated_seconds,
    (select s.mean_seconds from pgscribe.owner_shares s where s.owner_id = new.user_id), 60);
  -- Known before the queue job is written, so that the row needs no second write.
  new.job_id := nextval('procrastinate.procrastinate_jobs_id_seq');
  return new;
end $$;

create or replace function pgscribe.guard_processing_job() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  derived text;
  changed text := case
    when new.id <> old.id then 'id'
    when new.created_at <> old.created_at then 'created_at'
    when new.user_id <> old.user_id then 'user_id'
    when new.file_path <> old.file_path then 'file_path'
    when new.audio_url is distinct from old.audio_url then 'audio_url'
    when new.webhook_url is distinct from old.webhook_url then 'webhook_url'
    when new.scheduled_at is distinct from old.scheduled_at then 'scheduled_at'
    when new.idempotency_key is distinct from old.idempotency_key then 'idempotency_key'
    when new.options <> old.options then 'options' end;
begin
  if changed is not null then
    perform pgscribe.reject(changed, 'never changes once the job is inserted', 'Insert another job.');
  end if;
  if (new.status, new.job_id) is distinct from (old.status, old.job_id) then
    select pgscribe.job_status(q.status) into derived from procrastinate.procrastinate_jobs q where q.id = new.job_id::bigint;
    if derived is null and old.status in ('queued', 'processing') then
      derived := 'cancelled';  -- the queue job was deleted
    end if;
    if new.status <> coalesce(derived, old.status) then
      perform pgscribe.reject('status', format('is derived from the queue job, which says "%s"', coalesce(derived, old.status)),
        'Call cancel_processing_job(id) or retry_processing_job(id).');
    end if;
    if new.job_id is distinct from old.job_id and exists (
        select from procrastinate.procrastinate_jobs q where q.id = old.job_id::bigint) then
      perform pgscribe.reject('job_id', 'is the id of the queue job, which is still there',
        'Call cancel_processing_job(id) or retry_processing_job(id).');
    end if;
  end if;
  -- A request counts once, at the database's time, and only where there is something to do.
  if new.cancel_requested_at is distinct from old.cancel_requested_at and old.status = new.status then
    new.cancel_requested_at := coalesce(old.cancel_requested_at,
      case when old.status in ('queued', 'processing') then now() end);
  end if;
  if new.retry_requested_at is distinct from old.retry_requested_at then
    new.retry_requested_at := case when old.status in ('failed', 'cancelled') then now() else old.retry_requested_at end;
    if new.retry_requested_at is distinct from old.retry_requested_at then  -- it is charged again
      new.estimated_seconds := coalesce(new.audio_seconds,
        (select s.mean_seconds from pgscribe.owner_shares s where s.owner_id = new.user_id), 60);
    end if;
  end if;
  new.updated_at := now();
  return new;
end $$;

drop trigger guard_processing_job on public.processing_jobs;
create trigger guard_processing_job before update on public.processing_jobs
  for each row when (new.updated_at = old.updated_at
    or (new.id, new.created_at, new.user_id, new.file_path, new.audio_url, new.webhook_url, new.options, new.scheduled_at,
        new.idempotency_key, new.cancel_requested_at, new.retry_requested_at) is distinct from
       (old.id, old.created_at, old.user_id, old.file_path, old.audio_url, old.webhook_url, old.options, old.scheduled_at,
        old.idempotency_key, old.cancel_requested_at, old.retry_requested_at)
    or ((new.status, new.job_id) is distinct from (old.status, old.job_id)
        and current_setting('pgscribe.mirroring', true) is distinct from 'on'))
  execute function pgscribe.guard_processing_job();

-- What owners may have -----------------------------------------------------------------------------------

create table pgscribe.default_limits (
  only_row boolean primary key default true check (only_row),
  max_queued integer not null default 10000 check (max_queued >= 0),
  max_audio_seconds_per_month double precision check (max_audio_seconds_per_month >= 0),
  max_file_bytes bigint check (max_file_bytes >= 0),
  max_duration double precision check (max_duration >= 0)
);
insert into pgscribe.default_limits default values;
comment on table pgscribe.default_limits is
  'One row: what an owner may have of whom pgscribe.owner_limits says nothing else. Null: no limit. How many may run is in pgscribe.queue_settings.';

alter table pgscribe.owner_limits
  add column max_queued integer check (max_queued >= 0),
  add column max_audio_seconds_per_month double precision check (max_audio_seconds_per_month >= 0),
  add column max_file_bytes bigint check (max_file_bytes >= 0),
  add column max_duration double precision check (max_duration >= 0);
comment on table pgscribe.owner_limits is
  'What an operator has set for an owner: a share greater or smaller than others'' (weight), jobs at a time, jobs that wait, audio-seconds a month, bytes and seconds of a recording, a pause. Null: as pgscribe.default_limits says.';

create table pgscribe.owner_usage (
  owner_id uuid not null,
  month date not null,
  audio_seconds double precision not null,
  jobs bigint not null,
  primary key (owner_id, month)
);
comment on table pgscribe.owner_usage is
  'Audio-seconds that were transcribed for each owner in each month (UTC), and of how many jobs. Deleting jobs does not change it.';

create table pgscribe.usage_news (
  owner_id uuid not null,
  month date not null,
  audio_seconds double precision not null,
  jobs bigint not null
);
create index usage_news_owner_idx on pgscribe.usage_news (owner_id);
comment on table pgscribe.usage_news is
  'What is still to be added to owner_usage. It only grows until then, so that no end of a job waits for another one.';

create table pgscribe.counted_jobs (
  job_id uuid primary key references public.processing_jobs (id) on delete cascade,
  audio_seconds double precision not null
);
comment on table pgscribe.counted_jobs is
  'Of jobs that ended without being completed, and may be tried again: what has been counted of them already.';

create table pgscribe.owner_queues (
  owner_id uuid primary key,
  queued bigint not null,
  as_of bigint not null
);
comment on table pgscribe.owner_queues is
  'How many jobs of an owner''s waited when the newest queue job had the id as_of. Each one more has an id of its own, so that they need not be counted again for as long as there can''t be too many.';

-- How many of an owner's jobs wait, and their list, newest first.
create index processing_jobs_queued_idx on public.processing_jobs (user_id, created_at desc, id desc) where status = 'queued';

create function pgscribe.this_month() returns date
language sql stable set search_path = pg_catalog, pg_temp as $$
  select date_trunc('month', now() at time zone 'UTC')::date
$$;
comment on function pgscribe.this_month is 'The first day of the month, in UTC.';

create function pgscribe.used_seconds(owner uuid) returns double precision
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce((select u.audio_seconds from pgscribe.owner_usage u where u.owner_id = owner and u.month = m), 0)
       + coalesce((select sum(n.audio_seconds) from pgscribe.usage_news n where n.owner_id = owner and n.month = m), 0)
    from pgscribe.this_month() m
$$;
comment on function pgscribe.used_seconds is 'The audio-seconds that were transcribed for an owner this month.';

create function pgscribe.count_queued(owner uuid, at_most bigint) returns bigint
language sql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
  select count(*) from (select from public.processing_jobs p where p.user_id = owner and p.status = 'queued' limit at_most) waiting
$$;
comment on function pgscribe.count_queued is 'How many jobs of an owner''s wait; it stops counting at some point.';

create function pgscribe.pending_seconds(owner uuid) returns double precision
language sql stable set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
  select coalesce(sum(s.seconds), 0) from (
    (select coalesce(p.audio_seconds, p.estimated_seconds) as seconds from public.processing_jobs p
      where p.user_id = owner and p.status = 'queued' limit 100000)
    union all
    (select coalesce(p.audio_seconds, p.estimated_seconds) from public.processing_jobs p
      where p.user_id = owner and p.status = 'processing' limit 100000)) s
$$;
comment on function pgscribe.pending_seconds is 'The audio-seconds of an owner''s jobs that wait or run, estimated until they are known.';

-- PostgREST answers SQLSTATE PT429 with HTTP status 429.
create function pgscribe.refuse_over_limit(
  field text, problem text, hint text, maximum double precision, current double precision, retry_after integer) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  raise exception using
    errcode = 'PT429', message = format('%s: %s', field, problem), hint = hint,
    detail = json_build_object('limit', maximum, 'current', current, 'retry_after', retry_after)::text,
    schema = 'public', table = 'processing_jobs', column = field;
end $$;
comment on function pgscribe.refuse_over_limit is 'Refuses what would be more than an owner may have, naming the limit and the way out. retry_after is in seconds.';

create function pgscribe.check_owner_limits(owner uuid, added bigint, added_seconds double precision) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  max_queued bigint;
  max_month double precision;
  newest bigint;
  known bigint;
  at_most bigint;
  margin bigint;
  alone boolean;
  waiting bigint;
  seconds double precision;
  key bigint := hashtextextended('pgscribe queue ' || owner, 0);
begin
  select coalesce(o.max_queued, d.max_queued),
         coalesce(o.max_audio_seconds_per_month, d.max_audio_seconds_per_month),
         s.last_value, k.queued, k.queued + s.last_value - k.as_of
    into max_queued, max_month, newest, known, at_most
    from pgscribe.default_limits d
   cross join procrastinate.procrastinate_jobs_id_seq s
    left join pgscribe.owner_limits o on o.owner_id = owner
    left join pgscribe.owner_queues k on k.owner_id = owner;
  -- Far from the limit nobody waits: there the margin is for what others insert at the same time. Near it, and for
  -- many rows at once, an owner's inserts take turns, and each sees what the one before has left.
  margin := 100 + max_queued / 10;
  alone := added * 10 > margin or coalesce(known > max_queued - margin, false);
  if alone or at_most is null or at_most > max_queued - margin then
    if not alone then
      waiting := pgscribe.count_queued(owner, max_queued + 1);
      alone := waiting > max_queued - margin;
    end if;
    if alone then
      perform pg_advisory_xact_lock(key);
      -- Their ids may be older than as_of, so they are added; once more than need be, as a rule.
      newest := (select s.last_value from procrastinate.procrastinate_jobs_id_seq s);
      update pgscribe.owner_queues k set queued = k.queued + added
       where k.owner_id = owner and k.queued + newest - k.as_of + added <= max_queued;
      if found then
        waiting := null;
      else
        waiting := pgscribe.count_queued(owner, max_queued + 1);
      end if;
    end if;
    if waiting > max_queued then
      perform pgscribe.refuse_over_limit('max_queued', format('the limit of %s jobs that wait is reached', max_queued),
        'Wait until some have started, cancel some, or ask for a higher limit.', max_queued, greatest(waiting - added, 0), 60);
    elsif waiting is not null and (alone or pg_try_advisory_xact_lock(key)) then
      insert into pgscribe.owner_queues as k (owner_id, queued, as_of) values (owner, waiting, newest)
      on conflict (owner_id) do update set queued = excluded.queued, as_of = excluded.as_of;
    end if;
  end if;
  if max_month < 'Infinity' then
    seconds := pgscribe.used_seconds(owner);
    if seconds < max_month then
      seconds := seconds + pgscribe.pending_seconds(owner) - added_seconds;
    end if;
    if seconds >= max_month then
      perform pgscribe.refuse_over_limit('max_audio_seconds_per_month',
        format('the limit of %s s of audio a month is reached, with what waits and runs', max_month),
        'Wait for the next month (UTC), cancel jobs that wait, or ask for a higher limit.', max_month, seconds,
        ceil(extract(epoch from (pgscribe.this_month() + interval '1 month') at time zone 'UTC' - now()))::integer);
    end if;
  end if;
end $$;
comment on function pgscribe.check_owner_limits is 'Refuses jobs that have just been added where an owner has too many that wait, or has used up the month.';

create function pgscribe.check_new_jobs() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  owner uuid;
  jobs bigint;
  seconds double precision;
begin
  for owner, jobs, seconds in select user_id, count(*), sum(estimated_seconds) from new_rows group by user_id order by user_id loop
    perform pgscribe.check_owner_limits(owner, jobs, seconds);
  end loop;
  return null;
end $$;
-- Before defer_processing_jobs, by its name: what is refused is not written to the queue.
create trigger check_new_jobs after insert on public.processing_jobs
  referencing new table as new_rows for each statement execute function pgscribe.check_new_jobs();

create or replace function pgscribe.retry_queue_job() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  queue_job_id bigint := new.job_id;
begin
  update procrastinate.procrastinate_jobs
     set status = 'todo', attempts = 0, scheduled_at = null, abort_requested = false, worker_id = null
   where id = queue_job_id and status not in ('todo', 'doing');
  if not found then  -- retention has removed it
    queue_job_id := nextval('procrastinate.procrastinate_jobs_id_seq');
    update public.processing_jobs set job_id = queue_job_id where id = new.id;
    insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, priority, args, status)
    values (queue_job_id, 'transcription', 'transcribe', new.priority,
            jsonb_build_object('processing_job_id', new.id), 'failed');
    update procrastinate.procrastinate_jobs set status = 'todo' where id = queue_job_id;
  end if;
  -- It waits like a new one; an id is spent, so that pgscribe.owner_queues takes it for one.
  perform nextval('procrastinate.procrastinate_jobs_id_seq');
  perform pgscribe.check_owner_limits(new.user_id, 1, coalesce(new.audio_seconds, new.estimated_seconds));
  perform pgscribe.wake_workers();
  return null;
end $$;

-- What was transcribed, each second once ---------------------------------------------------------------

create function pgscribe.transcribed_seconds(job uuid) returns double precision
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(sum(c.end_seconds - c.start_seconds), 0) from public.processing_job_chunks c
   where c.job_id = job and c.result is not null
$$;
comment on function pgscribe.transcribed_seconds is 'How much of a job''s audio has been transcribed, chunk by chunk.';

create function pgscribe.count_usage(jobs uuid[]) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  with done as (
    select p.id, p.user_id, p.status, u.audio_seconds as before,
           case p.status when 'completed' then coalesce(p.audio_seconds, 0) else pgscribe.transcribed_seconds(p.id) end as seconds
      from public.processing_jobs p left join pgscribe.counted_jobs u on u.job_id = p.id
     where p.id = any (jobs)),
  more as (
    select * from done where seconds > coalesce(before, 0) or (status = 'completed' and before is null)),
  noted as (
    insert into pgscribe.counted_jobs (job_id, audio_seconds) select id, seconds from more
    on conflict (job_id) do update set audio_seconds = excluded.audio_seconds)
  insert into pgscribe.usage_news (owner_id, month, audio_seconds, jobs)
  select user_id, pgscribe.this_month(), sum(seconds - coalesce(before, 0)), count(*) filter (where before is null)
    from more group by user_id
$$;
comment on function pgscribe.count_usage is
  'Counts what was transcribed of jobs that have just ended: all of those that are completed, the finished chunks of others, and nothing twice.';

create or replace function pgscribe.mirror_queue_status() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  given_up boolean := exists (select from new_rows where status not in ('doing', 'succeeded'));
  unusual uuid[];
begin
  if given_up then
    insert into public.processing_job_attempts (job_id, attempt, worker_id, started_at, outcome, error_code, error)
    select a.id, a.attempt, a.worker_id, a.started_at, a.outcome,
           case when a.outcome in ('failed', 'retried') then a.error_code end,
           case when a.outcome in ('failed', 'retried') then a.error end
      from (select p.*, o.worker_id,
                   case n.status when 'failed' then 'failed' when 'todo'
                     then case when n.attempts = o.attempts then 'released' else 'retried' end else 'cancelled' end as outcome
              from old_rows o join new_rows n using (id) join public.processing_jobs p on p.job_id = n.id::text
             where o.status = 'doing' and n.status not in ('doing', 'succeeded')) a
    on conflict do nothing;
  end if;
  perform set_config('pgscribe.mirroring', 'on', true);
  with changed as (
    update public.processing_jobs p set
        updated_at = now(),
        status = n.derived,
        attempt = p.attempt + (n.status = 'doing')::integer,
        started_at = case n.status when 'doing' then now() else p.started_at end,
        completed_at = case when n.status not in ('todo', 'doing') then now() end,
        due_at = case when n.status = 'todo' and n.scheduled_at > now() then n.scheduled_at end,
        cancel_requested_at = case when n.status = 'todo' then null else p.cancel_requested_at end,
        result = case n.status when 'doing' then null else p.result end,
        progress = case n.status when 'doing' then 0 when 'succeeded' then 1 else p.progress end,
        error_code = case n.status when 'succeeded' then null when 'failed' then coalesce(p.error_code, 'internal_error')
          else p.error_code end,
        error = case n.status when 'succeeded' then null
          when 'failed' then coalesce(p.error, 'The attempt ended without saying why.') else p.error end
      from (select *, case status when 'todo' then 'queued' when 'doing' then 'processing'
                   when 'succeeded' then 'completed' when 'failed' then 'failed' else 'cancelled' end as derived from new_rows) n
     where p.job_id = n.id::text and p.status <> n.derived
    returning p.id, p.user_id, p.status, p.audio_seconds, p.retry_requested_at),
  counted as (
    insert into pgscribe.usage_news (owner_id, month, audio_seconds, jobs)
    select user_id, pgscribe.this_month(), coalesce(sum(audio_seconds), 0), count(*) from changed
     where status = 'completed' and retry_requested_at is null group by user_id)
  select array_agg(id) into unusual from changed
   where status in ('failed', 'cancelled') or (status = 'completed' and retry_requested_at is not null);
  perform set_config('pgscribe.mirroring', '', true);
  if unusual is not null then
    perform pgscribe.count_usage(unusual);
  end if;
  if given_up then
    insert into pgscribe.woken_owners
    select distinct p.user_id
      from old_rows o join new_rows n using (id) join public.processing_jobs p on p.job_id = n.id::text
     where o.status <> 'todo' and n.status = 'todo';
  end if;
  return null;
end $$;

-- What a job has transcribed stays counted when it is deleted while it waits or runs.
create function pgscribe.count_deleted_job() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  insert into pgscribe.usage_news (owner_id, month, audio_seconds, jobs)
  select old.user_id, pgscribe.this_month(), d.seconds - d.before, (d.before = 0)::integer
    from (select pgscribe.transcribed_seconds(old.id) as seconds,
                 coalesce((select u.audio_seconds from pgscribe.counted_jobs u where u.job_id = old.id), 0) as before) d
   where d.seconds > d.before;
  return old;
end $$;
create trigger count_deleted_job before delete on public.processing_jobs
  for each row when (old.attempt > 0 and old.status in ('queued', 'processing')) execute function pgscribe.count_deleted_job();

create function pgscribe.add_up_usage() returns integer
language sql volatile set search_path = pg_catalog, pg_temp as $$
  with news as (delete from pgscribe.usage_news returning *),
  added as (
    insert into pgscribe.owner_usage as u (owner_id, month, audio_seconds, jobs)
    select owner_id, month, sum(audio_seconds), sum(jobs) from news group by 1, 2 order by 1, 2
    on conflict (owner_id, month) do update set
      audio_seconds = u.audio_seconds + excluded.audio_seconds, jobs = u.jobs + excluded.jobs)
  select count(*)::integer from news
$$;
comment on function pgscribe.add_up_usage is 'Adds what jobs have used since the last time to pgscribe.owner_usage; returns of how many entries.';

-- Once the length is known, before anything is transcribed ---------------------------------------------

alter table pgscribe.preparations add column refusal jsonb;
comment on column pgscribe.preparations.refusal is 'Why the plan is not to be carried out: code and message. Null: it may be.';

create function pgscribe.refuse_plan(job uuid, seconds double precision) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  owner uuid;
  longest double precision;
  max_month double precision;
  taken double precision;
begin
  select p.user_id, coalesce(o.max_duration, d.max_duration), coalesce(o.max_audio_seconds_per_month, d.max_audio_seconds_per_month)
    into owner, longest, max_month
    from pgscribe.default_limits d join public.processing_jobs p on p.id = job
    left join pgscribe.owner_limits o on o.owner_id = p.user_id;
  if seconds > longest then
    return jsonb_build_object('code', 'audio_too_long', 'message', format(
      'max_duration: the recording lasts %s s, more than the limit of %s s; split it, or ask for a higher limit', round(seconds::numeric, 1), longest));
  elsif max_month < 'Infinity' then
    perform pg_advisory_xact_lock(hashtextextended('pgscribe month ' || owner, 0));
    -- What has been transcribed, and what others of the owner's jobs have been let through with.
    select pgscribe.used_seconds(owner)
           + coalesce(sum(p.audio_seconds - coalesce((select u.audio_seconds from pgscribe.counted_jobs u where u.job_id = p.id), 0)), 0)
           - coalesce((select u.audio_seconds from pgscribe.counted_jobs u where u.job_id = refuse_plan.job), 0)
      into taken
      from public.processing_jobs p join pgscribe.preparations r on r.job_id = p.id
     where p.user_id = owner and p.status in ('queued', 'processing') and p.audio_seconds is not null and p.id <> job
       and r.plan is not null and r.refusal is null;
    if taken + seconds > max_month then
      return jsonb_build_object('code', 'quota_exceeded', 'message', format(
        'max_audio_seconds_per_month: the recording lasts %s s, and of the limit of %s s a month %s s are left; wait for the next month (UTC), or ask for a higher limit',
        round(seconds::numeric, 1), max_month, round(greatest(max_month - taken, 0)::numeric, 1)));
    end if;
  end if;
  return null;
end $$;
comment on function pgscribe.refuse_plan is 'Says why a job may not be transcribed, now that its length is known; null: it may.';

create or replace function pgscribe.store_plan(
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
         cpu_seconds = r.cpu_seconds + store_plan.cpu_seconds, gpu_seconds = r.gpu_seconds + store_plan.gpu_seconds,
         refusal = pgscribe.refuse_plan(job, (store_plan.plan ->> 'duration')::float8)
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
  'Stores what a preparation''s call returned: the spans become chunks, the length is known from now on, and whether the owner may have so much. Doing it again changes nothing.';

create function pgscribe.job_limits(job uuid, out max_file_bytes bigint, out max_seconds double precision)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(o.max_file_bytes, d.max_file_bytes), nullif(coalesce(o.max_duration, d.max_duration), 'Infinity')
    from pgscribe.default_limits d join public.processing_jobs p on p.id = job
    left join pgscribe.owner_limits o on o.owner_id = p.user_id
$$;
comment on function pgscribe.job_limits is
  'How large a job''s file may be, in bytes, and how long its recording, in seconds, as far as its owner has such limits. For the worker, before it prepares the audio.';

-- For operators, and for owners to see ---------------------------------------------------------------------

drop function public.limit_owner;
create function public.limit_owner(
  owner_id uuid, max_running integer default null, weight real default null, max_queued integer default null,
  max_audio_seconds_per_month double precision default null, max_file_bytes bigint default null,
  max_duration double precision default null) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  insert into pgscribe.owner_limits (owner_id, max_running, weight, max_queued, max_audio_seconds_per_month, max_file_bytes, max_duration)
  values (limit_owner.owner_id, limit_owner.max_running, limit_owner.weight, limit_owner.max_queued,
          limit_owner.max_audio_seconds_per_month, limit_owner.max_file_bytes, limit_owner.max_duration)
  on conflict (owner_id) do update set
    max_running = excluded.max_running, weight = excluded.weight, max_queued = excluded.max_queued,
    max_audio_seconds_per_month = excluded.max_audio_seconds_per_month,
    max_file_bytes = excluded.max_file_bytes, max_duration = excluded.max_duration;
  select pgscribe.wake_workers();
$$;
comment on function public.limit_owner is
  'Sets all limits of an owner, null being the default: jobs that run and that wait, their share (weight: 1; 2 is twice the others''), audio-seconds a month, bytes and seconds of a recording. ''Infinity'' is no limit of seconds.';

create function public.limit_owners(
  max_running integer default null, max_queued integer default null, max_audio_seconds_per_month double precision default null,
  max_file_bytes bigint default null, max_duration double precision default null) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  update pgscribe.queue_settings set max_running_per_owner = coalesce(limit_owners.max_running, 100) where queue_name = 'transcription';
  update pgscribe.default_limits set
    max_queued = coalesce(limit_owners.max_queued, 10000), max_audio_seconds_per_month = limit_owners.max_audio_seconds_per_month,
    max_file_bytes = limit_owners.max_file_bytes, max_duration = limit_owners.max_duration;
  select pgscribe.wake_workers();
$$;
comment on function public.limit_owners is
  'Sets all limits of owners who have none of their own; null: 100 jobs that run, 10000 that wait, and no other limit.';

revoke execute on function public.limit_owner, public.limit_owners from public, anon, authenticated;
grant execute on function public.limit_owner, public.limit_owners to service_role;

create function public.my_limits() returns table ("limit" text, maximum double precision, current double precision)
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select l.name, nullif(l.maximum, 'Infinity'), l.current
    from (select auth.uid() as id) me
   cross join pgscribe.default_limits d
    join pgscribe.queue_settings s on s.queue_name = 'transcription'
    left join pgscribe.owner_limits o on o.owner_id = me.id
   cross join lateral (values
     ('max_queued', coalesce(o.max_queued, d.max_queued)::float8,
       pgscribe.count_queued(me.id, coalesce(o.max_queued, d.max_queued) + 1::bigint)::float8),
     ('max_running', coalesce(o.max_running, s.max_running_per_owner),
       (select count(*) from public.processing_jobs p where p.user_id = me.id and p.status = 'processing')),
     ('max_audio_seconds_per_month', coalesce(o.max_audio_seconds_per_month, d.max_audio_seconds_per_month), pgscribe.used_seconds(me.id)),
     ('max_file_bytes', coalesce(o.max_file_bytes, d.max_file_bytes), null),
     ('max_duration', coalesce(o.max_duration, d.max_duration), null)) l (name, maximum, current)
   where me.id is not null
$$;
comment on function public.my_limits is
  'What the caller may have (maximum; null: no limit) and has (current): jobs that wait and run, audio-seconds of this month (UTC), bytes and seconds of a recording.';
revoke execute on function public.my_limits from public, anon, service_role;
grant execute on function public.my_limits to authenticated;

-- Deletion -----------------------------------------------------------------------------------------------

create policy "Owners delete their jobs" on public.processing_jobs
  for delete to authenticated using (user_id = (select auth.uid()));
grant delete on public.processing_jobs to authenticated;

create table pgscribe.audio_to_delete (
  id bigint primary key generated always as identity,
  file_path text not null,
  queue_job_id bigint,
  since timestamptz not null default now(),
  tried_at timestamptz
);
comment on table pgscribe.audio_to_delete is
  'Audio of deleted jobs that is to be deleted from storage, once queue_job_id, which may still read it, is gone, unless another job names it by then.';

-- Whether a job that has ended names a file. The others are few, and an entry for each of their changes would cost more.
-- No hash index: very many jobs may name one file, and each insert would read all of its bucket.
create index processing_jobs_file_path_idx on public.processing_jobs (hashtextextended(file_path, 0))
  where status in ('completed', 'failed', 'cancelled');

create or replace function pgscribe.abort_deleted_processing_jobs() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if current_setting('pgscribe.delete_audio', true) = 'on' then
    insert into pgscribe.audio_to_delete (file_path, queue_job_id)
    select o.file_path, case when o.status = 'processing' then o.job_id::bigint end
      from old_rows o where split_part(o.file_path, '/', 1) = o.user_id::text;
  end if;
  update procrastinate.procrastinate_jobs q set abort_requested = true
    from old_rows o where q.id = o.job_id::bigint and q.status::text = 'doing';
  delete from procrastinate.procrastinate_jobs q
   using old_rows o where q.id = o.job_id::bigint and q.status <> 'doing';
  return null;
end $$;

-- It runs as the caller, so that row level security decides who may delete what. The marker is no secret:
-- whoever sets it has the audio deleted of jobs that they may delete.
create function public.delete_processing_job(id uuid, keep_audio boolean default false) returns boolean
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
  deleted boolean;
begin
  perform set_config('pgscribe.delete_audio', case when keep_audio then '' else 'on' end, true);
  delete from public.processing_jobs p where p.id = delete_processing_job.id;
  deleted := found;
  perform set_config('pgscribe.delete_audio', '', true);
  return deleted;
end $$;
comment on function public.delete_processing_job is
  'Deletes a job, stopping it if it runs, and its audio within minutes, unless that is to be kept, lies outside the owner''s folder or is named by another job. False: there is no such job that you may delete.';
revoke execute on function public.delete_processing_job from public, anon;
grant execute on function public.delete_processing_job to authenticated, service_role;

create function pgscribe.audio_to_delete(batch integer) returns text[]
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  paths text[];
begin
  paths := array(
    select a.file_path from pgscribe.audio_to_delete a
     group by a.file_path
    having not bool_or(exists (select from procrastinate.procrastinate_jobs q where q.id = a.queue_job_id and q.status = 'doing'))
     order by min(a.tried_at) nulls first, min(a.id) limit batch);
  if paths = '{}' then
    return paths;
  end if;
  delete from pgscribe.audio_to_delete a
   where a.file_path = any (paths)
     and (exists (select from public.processing_jobs p
                  where hashtextextended(p.file_path, 0) = hashtextextended(a.file_path, 0) and p.file_path = a.file_path
                    and p.status in ('completed', 'failed', 'cancelled'))
       or a.file_path in (select p.file_path from public.processing_jobs p where p.status = 'queued')
       or a.file_path in (select p.file_path from public.processing_jobs p where p.status = 'processing'));
  update pgscribe.audio_to_delete a set tried_at = now() where a.file_path = any (paths);
  return array(select distinct a.file_path from pgscribe.audio_to_delete a where a.file_path = any (paths));
end $$;
comment on function pgscribe.audio_to_delete is
  'Audio that is to be deleted: no attempt reads it, no job names it. Delete it, then forget_deleted_audio; what can''t be deleted comes again, after the others.';

create function pgscribe.forget_deleted_audio(paths text[]) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  delete from pgscribe.audio_to_delete a where a.file_path = any (paths)
$$;
comment on function pgscribe.forget_deleted_audio is 'Notes that these files are gone.';

-- Retention: what is known of owners goes with them.
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
      delete from pgscribe.owner_queues k where not exists (select from auth.users u where u.id = k.owner_id);
      delete from pgscribe.owner_usage o where not exists (select from auth.users u where u.id = o.owner_id);
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
