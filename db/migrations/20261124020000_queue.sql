-- The queue: fair claims in batches, attempts that end in batches, a sweep of what dead workers left,
-- cancel and retry by whoever may, pauses, limits, retention.
--
-- Locks are taken in one order everywhere: processing_jobs, then procrastinate_jobs, then the one row
-- of pgscribe.fair_queue, then pgscribe.owner_shares. Only what holds the row of fair_queue touches
-- owner_shares. docs/decisions/0002-queue.md says why.

-- Room on each page for what follows an insert: a job's progress and result then touch no index.
alter table public.processing_jobs set (fillfactor = 50);
alter table public.processing_jobs
  add column priority smallint not null default 0 check (priority between -100 and 100),
  add column idempotency_key text check (length(idempotency_key) between 1 and 200),
  add column max_attempts smallint check (max_attempts between 1 and 20),
  add column due_at timestamptz,
  add column estimated_seconds double precision check (estimated_seconds >= 0 and estimated_seconds < 'Infinity'),
  add column cancel_requested_at timestamptz,
  add column retry_requested_at timestamptz;

comment on column public.processing_jobs.priority is
  'Which of its owner''s jobs goes first: -100 to 100, higher first. It never overtakes other owners'' jobs.';
comment on column public.processing_jobs.idempotency_key is
  'The owner''s own name for this job: a second insert with it conflicts, and is refused if it asks for anything else.';
comment on column public.processing_jobs.max_attempts is 'Attempts before the job is failed; null: the worker''s setting.';
comment on column public.processing_jobs.due_at is
  'The job waits for this time: its schedule, or the pause before another attempt. Null: it may start now.';
comment on column public.processing_jobs.estimated_seconds is
  'What the job counts for in its owner''s fair share: an estimate until the length of the audio is known.';
comment on column public.processing_jobs.cancel_requested_at is 'Set it to cancel the job, or call cancel_processing_job(id).';
comment on column public.processing_jobs.retry_requested_at is
  'Set it to run a failed or cancelled job again, or call retry_processing_job(id).';
comment on table public.processing_jobs is
  'Transcription jobs. Insert a row to start one; everything but user_id, file_path, options, scheduled_at, priority, idempotency_key and max_attempts is written by pgscribe.';
comment on column public.processing_jobs.job_id is
  'Id of the queue job in procrastinate.procrastinate_jobs; null once retention has removed that.';

create unique index processing_jobs_idempotency_idx on public.processing_jobs (user_id, idempotency_key)
  where idempotency_key is not null;
-- The next job of an owner: the claim reads as many entries as it takes jobs.
create index processing_jobs_waiting_idx on public.processing_jobs (user_id, priority desc, (job_id::bigint))
  where status = 'queued' and due_at is null;
create index processing_jobs_due_idx on public.processing_jobs (due_at) where status = 'queued' and due_at is not null;
create index processing_jobs_running_idx on public.processing_jobs (user_id) where status = 'processing';
create index processing_jobs_ended_idx on public.processing_jobs (completed_at) where completed_at is not null;

-- Deleting a worker looks for all that it ever ran; nothing else indexes that.
create index pgscribe_jobs_worker_idx on procrastinate.procrastinate_jobs (worker_id) where worker_id is not null;
-- Running jobs that are to stop, and those whose worker has been forgotten: none, most of the time.
create index pgscribe_jobs_abort_idx on procrastinate.procrastinate_jobs (worker_id) where abort_requested;
create index pgscribe_jobs_orphaned_idx on procrastinate.procrastinate_jobs (id) where status = 'doing' and worker_id is null;
-- Whether there is anything to do but transcriptions, and when; it holds a few rows. Nothing is in procrastinate's
-- old state aborting: with it, no index of all that waits answers the question as well, and none is read for it.
create index pgscribe_jobs_others_idx on procrastinate.procrastinate_jobs ((coalesce(scheduled_at, '-infinity')))
  where status in ('todo', 'aborting') and queue_name <> 'transcription';

-- History ---------------------------------------------------------------------------------------------

create table public.processing_job_attempts (
  job_id uuid not null references public.processing_jobs (id) on delete cascade,
  attempt integer not null,
  worker_id bigint,
  started_at timestamptz not null,
  ended_at timestamptz not null default now(),
  outcome text not null check (outcome in ('failed', 'retried', 'released', 'cancelled')),
  error_code text,
  error text,
  primary key (job_id, attempt)
);
comment on table public.processing_job_attempts is
  'Attempts that did not complete their job, and why. The attempt that did is the job''s own row.';
comment on column public.processing_job_attempts.job_id is 'The job.';
comment on column public.processing_job_attempts.attempt is 'The attempt''s number, from 1.';
comment on column public.processing_job_attempts.worker_id is 'The worker that made it.';
comment on column public.processing_job_attempts.started_at is 'When the worker claimed the job.';
comment on column public.processing_job_attempts.ended_at is 'When the attempt ended.';
comment on column public.processing_job_attempts.outcome is
  'failed: the last one; retried: another one follows; released: given back by a stopping worker; cancelled.';
comment on column public.processing_job_attempts.error_code is 'Stable code of the error.';
comment on column public.processing_job_attempts.error is 'The error, for people.';

alter table public.processing_job_attempts enable row level security;
create policy "Owners see the attempts at their jobs" on public.processing_job_attempts
  for select to authenticated
  using (exists (select from public.processing_jobs p where p.id = processing_job_attempts.job_id and p.user_id = (select auth.uid())));
revoke all on public.processing_job_attempts from public, anon, authenticated, service_role;
grant select on public.processing_job_attempts to authenticated, service_role;

-- Fair share: start-time fair queueing on audio-seconds --------------------------------------------------
-- Goyal, Vin, Cheng: Start-time Fair Queueing, SIGCOMM 1996. An owner's virtual time is what they have
-- been given, in audio-seconds by weight; the claim serves whoever has been given least.

create table pgscribe.fair_queue (
  only_row boolean primary key default true check (only_row),
  virtual_time double precision not null default 0
);
insert into pgscribe.fair_queue default values;
comment on table pgscribe.fair_queue is
  'One row: the start tag of the job that was claimed last. Who claims holds it, so that claims take turns.';

create table pgscribe.owner_shares (
  owner_id uuid primary key,
  virtual_time double precision not null default 0,
  waiting boolean not null default true,
  mean_seconds double precision
);
create index owner_shares_next_idx on pgscribe.owner_shares (virtual_time) where waiting;
comment on table pgscribe.owner_shares is
  'What each owner has been given, in audio-seconds by weight; waiting: they may have jobs to start.';

create table pgscribe.woken_owners (owner_id uuid not null);
comment on table pgscribe.woken_owners is
  'Owners with new jobs to start, for the next claim to read. A table of its own, so that an insert never waits for another one.';

create table pgscribe.owner_limits (
  owner_id uuid primary key references auth.users (id) on delete cascade,
  weight real check (weight > 0 and weight < 'Infinity'),
  max_running integer check (max_running > 0),
  paused_at timestamptz
);
comment on table pgscribe.owner_limits is
  'What an operator has set for an owner: a share greater or smaller than others'' (weight), jobs at a time, a pause.';

create table pgscribe.queue_settings (
  queue_name text primary key,
  paused_at timestamptz,
  max_running_per_owner integer not null default 100 check (max_running_per_owner > 0)
);
insert into pgscribe.queue_settings (queue_name) values ('transcription');
comment on table pgscribe.queue_settings is 'Queues that are paused, and how many jobs at a time an owner may have in them.';

-- What an insert may say -------------------------------------------------------------------------------

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
      'Insert user_id, file_path, options, scheduled_at, priority, idempotency_key and max_attempts.');
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
  -- Other users' keys are none of the caller's business; row level security refuses the row then.
  if new.idempotency_key is not null and coalesce(auth.uid(), new.user_id) = new.user_id then
    select * into first from public.processing_jobs p
     where p.user_id = new.user_id and p.idempotency_key = new.idempotency_key;
    if first.id is not null and (first.file_path, first.options, first.scheduled_at, first.priority, first.max_attempts)
        is distinct from (new.file_path, new.options, new.scheduled_at, new.priority, new.max_attempts) then
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

-- One door ---------------------------------------------------------------------------------------------

create or replace function pgscribe.defer_processing_jobs() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, priority, args, scheduled_at)
  select job_id::bigint, 'transcription', 'transcribe', priority,
         jsonb_build_object('processing_job_id', id), due_at
    from new_rows;
  insert into pgscribe.woken_owners select distinct user_id from new_rows where due_at is null;
  return null;
end $$;

-- A worker that still runs a deleted job stops and deletes the queue job; the others go at once.
create or replace function pgscribe.abort_deleted_processing_jobs() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  update procrastinate.procrastinate_jobs q set abort_requested = true
    from old_rows o where q.id = o.job_id::bigint and q.status::text = 'doing';
  delete from procrastinate.procrastinate_jobs q
   using old_rows o where q.id = o.job_id::bigint and q.status <> 'doing';
  return null;
end $$;

-- One truth --------------------------------------------------------------------------------------------

create or replace function pgscribe.mirror_queue_status() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  given_up boolean := exists (select from new_rows where status not in ('doing', 'succeeded'));
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
   where p.job_id = n.id::text and p.status <> n.derived;
  perform set_config('pgscribe.mirroring', '', true);
  if given_up then
    insert into pgscribe.woken_owners
    select distinct p.user_id
      from old_rows o join new_rows n using (id) join public.processing_jobs p on p.job_id = n.id::text
     where o.status <> 'todo' and n.status = 'todo';
  end if;
  return null;
end $$;

create or replace function pgscribe.mirror_queue_deletion() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  update public.processing_jobs p set
      job_id = null,
      status = case when p.status in ('queued', 'processing') then 'cancelled' else p.status end,
      completed_at = coalesce(p.completed_at, now()),
      error_code = case when p.status in ('queued', 'processing') then 'queue_job_deleted' else p.error_code end,
      error = case when p.status in ('queued', 'processing')
        then 'The queue job was deleted before the job ended.' else p.error end
    from old_rows o
   where p.job_id = o.id::text;
  return null;
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

-- One row in two comes here from the mirror, which needs no check: it says so while it writes. That is no
-- secret, but only the table's owner may update status at all, and does not say it by mistake.
drop trigger guard_processing_job on public.processing_jobs;
create trigger guard_processing_job before update on public.processing_jobs
  for each row when (new.updated_at = old.updated_at
    or (new.id, new.created_at, new.user_id, new.file_path, new.options, new.scheduled_at, new.idempotency_key,
        new.cancel_requested_at, new.retry_requested_at) is distinct from
       (old.id, old.created_at, old.user_id, old.file_path, old.options, old.scheduled_at, old.idempotency_key,
        old.cancel_requested_at, old.retry_requested_at)
    or ((new.status, new.job_id) is distinct from (old.status, old.job_id)
        and current_setting('pgscribe.mirroring', true) is distinct from 'on'))
  execute function pgscribe.guard_processing_job();

-- Cancel and retry: whoever may update the row may, so that row level security decides ---------------------

create function pgscribe.cancel_queue_job() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform procrastinate.procrastinate_cancel_job_v1(new.job_id::bigint, true, false);
  return null;
end $$;
create trigger cancel_queue_job after update on public.processing_jobs
  for each row when (old.cancel_requested_at is null and new.cancel_requested_at is not null)
  execute function pgscribe.cancel_queue_job();

create function pgscribe.retry_queue_job() returns trigger
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
  perform pgscribe.wake_workers();
  return null;
end $$;
create trigger retry_queue_job after update on public.processing_jobs
  for each row when (old.retry_requested_at is distinct from new.retry_requested_at)
  execute function pgscribe.retry_queue_job();

create policy "Owners cancel and retry their jobs" on public.processing_jobs
  for update to authenticated using (user_id = (select auth.uid())) with check (user_id = (select auth.uid()));
grant update (cancel_requested_at, retry_requested_at) on public.processing_jobs to authenticated, service_role;
grant insert (priority, idempotency_key, max_attempts) on public.processing_jobs to authenticated;
grant insert (priority, idempotency_key, max_attempts, estimated_seconds) on public.processing_jobs to service_role;

create function public.cancel_processing_job(id uuid) returns public.processing_jobs
language sql volatile security invoker set search_path = pg_catalog, pg_temp as $$
  update public.processing_jobs p set cancel_requested_at = now() where p.id = cancel_processing_job.id;
  select p from public.processing_jobs p where p.id = cancel_processing_job.id
$$;
comment on function public.cancel_processing_job is
  'Cancels a job: at once while it waits, within seconds while it runs, not at all once it has ended. Returns the row, or null if there is none that you may see.';

create function public.retry_processing_job(id uuid) returns public.processing_jobs
language sql volatile security invoker set search_path = pg_catalog, pg_temp as $$
  update public.processing_jobs p set retry_requested_at = now() where p.id = retry_processing_job.id;
  select p from public.processing_jobs p where p.id = retry_processing_job.id
$$;
comment on function public.retry_processing_job is
  'Runs a failed or cancelled job again, with all its attempts; others are left as they are. Returns the row, or null if there is none that you may see.';

revoke execute on function public.cancel_processing_job, public.retry_processing_job from public, anon;
grant execute on function public.cancel_processing_job, public.retry_processing_job to authenticated, service_role;

-- Workers -------------------------------------------------------------------------------------------------

create function pgscribe.wake_workers() returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select pg_notify('procrastinate_queue_v1#transcription',
    jsonb_build_object('type', 'job_inserted', 'job_id', -pg_current_xact_id()::text::bigint)::text)
$$;
comment on function pgscribe.wake_workers is 'Tells the workers that there are jobs to start; procrastinate does so for new ones only.';

-- What the worker reports of attempts that have ended.
create type pgscribe.ended_attempt as (
  queue_job_id bigint,
  job_id uuid,  -- null: a queue job of another kind
  attempt integer,  -- the processing job's, or how often the queue job of another kind was tried before
  outcome text,
  result jsonb,
  audio_seconds double precision,
  error_code text,
  error text,
  retry_after double precision
);

create function pgscribe.end_attempts(
  worker bigint, ended pgscribe.ended_attempt[], default_max_attempts integer,
  out held uuid[], out owners uuid[], out corrections double precision[], out lengths double precision[])
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  -- The fence: the row of a claim that is still good. What somebody else has locked is left for later.
  select array_agg(l.id), array_agg(l.user_id), array_agg(l.correction), array_agg(l.length)
    into held, owners, corrections, lengths
    from (
      select p.id, p.user_id,
             case when e.outcome in ('succeeded', 'failed', 'cancelled')
               then coalesce(e.audio_seconds, p.audio_seconds, extract(epoch from now() - p.started_at)) - p.estimated_seconds
               else 0 end as correction,
             case when e.outcome = 'succeeded' then e.audio_seconds end as length
        from unnest(ended) e join public.processing_jobs p on p.id = e.job_id
        join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
       where p.attempt = e.attempt and p.status || '' = 'processing'  -- by its id, not by an index of all running ones
         for update of p, q skip locked) l;
  -- Queue jobs of another kind, and those whose job has been deleted.
  if held is null or cardinality(held) < cardinality(ended) then
    update procrastinate.procrastinate_jobs q set
        status = case e.outcome when 'succeeded' then 'succeeded' when 'failed' then 'failed' when 'cancelled' then 'aborted'
          else case when q.abort_requested then 'aborted' else 'todo' end end::procrastinate.procrastinate_job_status,
        attempts = q.attempts + (e.outcome <> 'released')::integer,
        scheduled_at = case when e.retry_after > 0 then now() + make_interval(secs => e.retry_after) end,
        abort_requested = false, worker_id = null
      from unnest(ended) e
     where e.job_id is null and q.id = e.queue_job_id and q.queue_name <> 'transcription'
       and q.status::text = 'doing' and q.worker_id = worker and q.attempts = e.attempt;
    delete from procrastinate.procrastinate_jobs q using unnest(ended) e
     where q.id = e.queue_job_id and q.queue_name = 'transcription' and q.status::text = 'doing'
       and not exists (select from public.processing_jobs p where p.job_id = q.id::text);
  end if;
  if held is null then
    return;
  end if;
  update public.processing_jobs p set
      updated_at = now(),
      result = e.result,
      audio_seconds = coalesce(e.audio_seconds, p.audio_seconds),
      -- Of unknown audio the time counts that the slot was taken.
      estimated_seconds = case when e.outcome in ('succeeded', 'failed', 'cancelled')
        then coalesce(e.audio_seconds, p.audio_seconds, extract(epoch from now() - p.started_at)) else p.estimated_seconds end,
      error_code = coalesce(e.error_code, p.error_code),
      error = coalesce(e.error, p.error)
    from unnest(ended) e
   where p.id = e.job_id and p.id = any (held) and e.outcome <> 'released';
  update procrastinate.procrastinate_jobs q set
      status = case
        when e.outcome = 'succeeded' then 'succeeded'
        when e.outcome = 'failed' then 'failed'
        when e.outcome = 'cancelled' or q.abort_requested then 'aborted'
        when e.outcome = 'retry' and q.attempts + 1 >= coalesce(p.max_attempts, default_max_attempts) then 'failed'
        else 'todo' end::procrastinate.procrastinate_job_status,
      attempts = q.attempts + (e.outcome <> 'released')::integer,
      scheduled_at = case when e.outcome = 'retry' and e.retry_after > 0
        then now() + make_interval(secs => e.retry_after) end,
      abort_requested = false,
      worker_id = null
    from unnest(ended) e join public.processing_jobs p on p.id = e.job_id
   where p.id = any (held) and q.id = p.job_id::bigint and q.status::text = 'doing';
end $$;
comment on function pgscribe.end_attempts is
  'Ends attempts that still hold their jobs (outcome: succeeded, failed, cancelled, retry, released) and returns those jobs. Late writers lose: an attempt that has lost its job changes nothing.';

create function pgscribe.claim_jobs(worker bigint, wanted integer, out jobs json, out claimed integer, out more boolean, out missed integer)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  now_serving double precision;
  default_max_running integer;
  paused boolean;
  any_due boolean;
  any_news boolean;
  more_due boolean := false;
  planned uuid[];
  start_tags double precision[];
  idle uuid[];
  crowded_out boolean;
begin
  claimed := 0;
  missed := 0;
  more := false;
  -- What these look for may have gone by the time the lock is there; what is new will be notified.
  select f.virtual_time, s.max_running_per_owner, s.paused_at is not null,
         exists (select from public.processing_jobs d where d.status = 'queued' and d.due_at <= now()),
         exists (select from pgscribe.woken_owners)
    into now_serving, default_max_running, paused, any_due, any_news
    from pgscribe.fair_queue f cross join pgscribe.queue_settings s
   where s.queue_name = 'transcription' for update of f;
  if paused then
    return;
  end if;

  -- Schedules and pauses that are over.
  if any_due then
    with due as (
      update public.processing_jobs p set due_at = null
       where p.id in (select d.id from public.processing_jobs d
                       where d.status = 'queued' and d.due_at <= now()
                       order by d.due_at limit 1000 for update skip locked)
      returning p.user_id),
    woken as (insert into pgscribe.woken_owners select distinct user_id from due)
    select true, count(*) = 1000 into any_news, more_due from due;
  end if;
  -- New jobs. An owner who comes back starts level with the others, not with what they saved up.
  if any_news then
    with news as (delete from pgscribe.woken_owners returning owner_id)
    insert into pgscribe.owner_shares as s (owner_id, virtual_time)
    select distinct owner_id, now_serving from news
    on conflict (owner_id) do update set
      waiting = true, virtual_time = greatest(s.virtual_time, excluded.virtual_time)
    where not s.waiting;
  end if;

  -- The owners who have been given least, and from each about as many jobs as their part of the batch.
  -- No job goes before the first one that was not listed: then the batch ends there.
  loop
    select array_agg(l.id order by l.start_tag, l.queue_job_id) filter (where l.start_tag <= l.horizon),
           array_agg(l.start_tag order by l.start_tag, l.queue_job_id) filter (where l.start_tag <= l.horizon),
           array_agg(l.owner_id) filter (where l.id is null),
           bool_or(l.horizon < 'Infinity'), bool_or(l.id is null and l.owners = wanted)
      into planned, start_tags, idle, more, crowded_out
      from (
        select *, coalesce(min(unlisted_tag) over (), 'Infinity') as horizon from (
          select c.owner_id, c.owners, j.id, j.queue_job_id,
                 c.virtual_time + (sum(j.seconds) over so_far - j.seconds) / c.weight as start_tag,
                 case when c.depth < least(c.room, wanted) and row_number() over so_far = c.depth
                   then c.virtual_time + sum(j.seconds) over so_far / c.weight end as unlisted_tag
            from (
              select *, least(room, wanted, 1 + 2 * wanted / owners) as depth from (
                select *, count(*) over () as owners from (
                  select s.owner_id, s.virtual_time, coalesce(l.weight, 1) as weight,
                         coalesce(l.max_running, default_max_running) - running.count as room
                    from pgscribe.owner_shares s
                    left join pgscribe.owner_limits l using (owner_id)
                   cross join lateral (
                     select count(*) from public.processing_jobs r
                      where r.user_id = s.owner_id and r.status = 'processing') running
                   where s.waiting and l.paused_at is null and coalesce(l.max_running, default_max_running) > running.count
                   order by s.virtual_time limit wanted) least_given) counted) c
            left join lateral (
              select p.id, p.priority, p.job_id::bigint as queue_job_id,
                     case when p.attempt = 0 or p.retry_requested_at > p.started_at then p.estimated_seconds else 0 end as seconds
                from public.processing_jobs p
               where p.user_id = c.owner_id and p.status = 'queued' and p.due_at is null
               order by p.priority desc, p.job_id::bigint limit c.depth) j on true
          window so_far as (partition by c.owner_id order by j.priority desc, j.queue_job_id rows unbounded preceding)) listed) l;
    if idle is not null then
      update pgscribe.owner_shares set waiting = false where owner_id = any (idle);
    end if;
    exit when crowded_out is distinct from true;  -- else those without jobs stood in the way of others
  end loop;
  planned := planned[1:wanted];
  start_tags := start_tags[1:wanted];
  more := coalesce(more, false) or more_due;
  if planned is null then
    return;
  end if;

  -- Claim them and charge their owners. Virtual time never runs backwards. Written as they are, the conditions
  -- on status keep the planner from reading an index of all waiting jobs for each, as it would while its statistics
  -- say that there are none.
  with locked as materialized (
    select p.id, p.user_id, p.attempt, p.file_path, p.options, q.id as queue_job_id, c.tag, c.place,
           case when p.attempt = 0 or p.retry_requested_at > p.started_at then p.estimated_seconds else 0 end as seconds
      from unnest(planned, start_tags) with ordinality c (id, tag, place)
      join public.processing_jobs p on p.id = c.id
      join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
     where p.status || '' = 'queued' and q.status::text = 'todo'
       for update of p, q skip locked),
  clock as (
    update pgscribe.fair_queue set virtual_time = (select max(tag) from locked)
     where virtual_time < (select max(tag) from locked)),
  charged as (
    update pgscribe.owner_shares s set virtual_time = s.virtual_time + c.seconds / coalesce(w.weight, 1)
      from (select user_id, sum(seconds) as seconds from locked group by 1) c
      left join pgscribe.owner_limits w on w.owner_id = c.user_id
     where s.owner_id = c.user_id),
  moved as (
    update procrastinate.procrastinate_jobs q set status = 'doing', worker_id = worker
      from locked l where q.id = l.queue_job_id
    returning l.*, q.priority, q.args, q.attempts, q.task_name, q.queue_name)
  select json_agg(json_build_object(
           'id', id, 'attempt', attempt + 1, 'user_id', user_id, 'file_path', file_path, 'options', options,
           'queue_job_id', queue_job_id, 'priority', priority, 'args', args, 'attempts', attempts,
           'task_name', task_name, 'queue_name', queue_name) order by place),
         count(*)
    into jobs, claimed from moved;
  missed := cardinality(planned) - claimed;
end $$;
comment on function pgscribe.claim_jobs is
  'Claims up to so many jobs for a worker, fairly between owners; none while the queue is paused. more: there are more to claim; missed: jobs that somebody else has locked.';

create function pgscribe.correct_shares(owners uuid[], corrections double precision[], lengths double precision[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  now_serving double precision;
begin
  select virtual_time into now_serving from pgscribe.fair_queue for update;
  -- What is given back counts towards the next job, not towards a lead over whoever came meanwhile.
  update pgscribe.owner_shares s set
      virtual_time = greatest(s.virtual_time + c.correction / coalesce(l.weight, 1),
        least(s.virtual_time, now_serving - c.largest_refund / coalesce(l.weight, 1))),
      mean_seconds = coalesce(0.8 * s.mean_seconds + 0.2 * c.mean, c.mean, s.mean_seconds)
    from (select owner_id, sum(correction) as correction, greatest(max(-correction), 0) as largest_refund,
                 avg(length) as mean
            from unnest(owners, corrections, lengths) u (owner_id, correction, length) group by 1) c
    left join pgscribe.owner_limits l using (owner_id)
   where s.owner_id = c.owner_id;
end $$;
comment on function pgscribe.correct_shares is 'Charges owners what their jobs'' audio turned out to be longer than estimated, or gives it back.';

create function pgscribe.claim_other_queue_jobs(worker bigint, wanted integer, queues text[]) returns json[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  open_queues text[] := array(select unnest(queues) except select s.queue_name from pgscribe.queue_settings s where s.paused_at is not null);
  jobs json[] := '{}';
  q procrastinate.procrastinate_jobs;
begin
  while wanted > 0 and cardinality(open_queues) > 0 loop
    q := procrastinate.procrastinate_fetch_job_v2(open_queues, worker);
    exit when q.id is null;
    jobs := jobs || json_build_object('queue_job_id', q.id, 'task_name', q.task_name, 'queue_name', q.queue_name,
      'priority', q.priority, 'args', q.args, 'attempts', q.attempts, 'lock', q.lock);
    wanted := wanted - 1;
  end loop;
  return jobs;
exception when unique_violation then  -- another worker took a job's lock meanwhile; the next turn tries again
  return '{}';
end $$;
comment on function pgscribe.claim_other_queue_jobs is 'Claims queue jobs that are no processing jobs, in procrastinate''s order and with its locks.';

create function pgscribe.turn(
  worker bigint, ended jsonb, wanted integer, running boolean, other_queues text[], default_max_attempts integer,
  announcement text,
  out jobs json, out others json[], out more boolean, out missed integer,
  out due double precision, out due_in double precision, out busy uuid[], out abort bigint[])
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
declare
  attempts pgscribe.ended_attempt[];
  held uuid[];
  owners uuid[];
  corrections double precision[];
  lengths double precision[];
  slots integer := wanted;
  claimed integer;
  next_due timestamptz;
  next_other timestamptz;
begin
  if ended is not null then
    attempts := array(select x from jsonb_populate_recordset(null::pgscribe.ended_attempt, ended) x);
    select e.held, e.owners, e.corrections, e.lengths into held, owners, corrections, lengths
      from pgscribe.end_attempts(worker, attempts, default_max_attempts) e;
    if cardinality(held) is distinct from cardinality(attempts) then
      select array_agg(p.id) into busy from unnest(attempts) x join public.processing_jobs p on p.id = x.job_id
       where p.attempt = x.attempt and p.status = 'processing' and p.id <> all (coalesce(held, '{}'));
    end if;
    -- Also where a stopping worker leaves a slot of an owner's to others.
    if wanted = 0 or exists (select from unnest(attempts) x where x.outcome in ('retry', 'released')) then
      perform pgscribe.wake_workers();
    end if;
    if 0 <> any (corrections) then
      perform pgscribe.correct_shares(owners, corrections, lengths);
    end if;
  end if;
  if wanted > 0 then
    -- One of another kind goes first, or retention would wait for as long as all slots are taken.
    next_other := (
      select min(coalesce(q.scheduled_at, '-infinity')) from procrastinate.procrastinate_jobs q
       where q.status in ('todo', 'aborting') and q.queue_name <> 'transcription' and q.queue_name = any (other_queues));
    if next_other <= now() then
      others := pgscribe.claim_other_queue_jobs(worker, 1, other_queues);
      wanted := wanted - coalesce(cardinality(others), 0);
    end if;
    select c.jobs, c.claimed, c.more, c.missed into jobs, claimed, more, missed from pgscribe.claim_jobs(worker, wanted) c;
    if wanted > claimed then
      next_due := (select min(p.due_at) from public.processing_jobs p where p.status = 'queued' and p.due_at > now());
      if next_other <= now() then
        others := others || pgscribe.claim_other_queue_jobs(worker, wanted - claimed, other_queues);
        next_other := (
          select min(coalesce(q.scheduled_at, '-infinity')) from procrastinate.procrastinate_jobs q
           where q.status in ('todo', 'aborting') and q.queue_name <> 'transcription' and q.queue_name = any (other_queues)
             and coalesce(q.scheduled_at, '-infinity') > now());
      end if;
      next_due := least(next_due, next_other);
      due := extract(epoch from next_due);
      due_in := extract(epoch from next_due - clock_timestamp());
      if announcement is not null and not more and slots > claimed + coalesce(cardinality(others), 0) then
        perform pg_notify('pgscribe_workers', announcement);
      end if;
    end if;
  end if;
  if running then
    abort := array(select q.id from procrastinate.procrastinate_jobs q
                    where q.worker_id = worker and q.status::text = 'doing' and q.abort_requested);
  end if;
end $$;
comment on function pgscribe.turn is
  'A worker''s turn, one transaction: ends attempts, claims jobs for the free slots. busy: attempts whose row somebody else has locked, to be ended later; abort: which of the running queue jobs are to stop; due: when a job falls due, and in how many seconds. The announcement goes to the other workers if slots are left.';

create function pgscribe.sweep_stalled_jobs(stall_timeout double precision, default_max_attempts integer) returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  dead bigint[];
  orphaned bigint[];
  ended pgscribe.ended_attempt[];
  swept integer;
begin
  perform from pgscribe.fair_queue for update;  -- one sweeper at a time
  -- After a restart nobody could send a heartbeat: give everybody the time to do so.
  if pg_postmaster_start_time() > now() - make_interval(secs => stall_timeout) then
    return 0;
  end if;
  dead := array(select id from procrastinate.procrastinate_workers
                 where last_heartbeat < now() - make_interval(secs => stall_timeout));
  orphaned := array(
    select q.id from procrastinate.procrastinate_jobs q where q.worker_id = any (dead) and q.status::text = 'doing'
    union all
    select q.id from procrastinate.procrastinate_jobs q where q.worker_id is null and q.status = 'doing');
  select array_agg(row(q.id, p.id, p.attempt, 'retry', null, null, 'worker_lost',
           format('Worker %s ended, or was not heard of for %s s, during attempt %s.',
             coalesce(q.worker_id::text, '(unknown)'), stall_timeout, p.attempt), 0)::pgscribe.ended_attempt)
    into ended
    from procrastinate.procrastinate_jobs q join public.processing_jobs p on p.job_id = q.id::text
   where q.id = any (orphaned);
  select coalesce(cardinality(e.held), 0) into swept from pgscribe.end_attempts(null, coalesce(ended, '{}'), default_max_attempts) e;
  -- Queue jobs whose processing job was deleted, and those of another kind.
  delete from procrastinate.procrastinate_jobs q
   where q.id = any (orphaned) and q.queue_name = 'transcription' and q.status::text = 'doing'
     and not exists (select from public.processing_jobs p where p.job_id = q.id::text);
  with others as (
    select q.id, q.attempts, q.abort_requested from procrastinate.procrastinate_jobs q
     where q.id = any (orphaned) and q.queue_name <> 'transcription' and q.status::text = 'doing'
       for update skip locked)
  update procrastinate.procrastinate_jobs q set
      status = case when o.abort_requested then 'aborted' when o.attempts + 1 >= default_max_attempts then 'failed'
        else 'todo' end::procrastinate.procrastinate_job_status,
      attempts = o.attempts + 1, abort_requested = false, worker_id = null
    from others o where q.id = o.id;
  delete from procrastinate.procrastinate_workers w
   where w.id = any (dead) and not exists (
     select from procrastinate.procrastinate_jobs q where q.worker_id = w.id and q.status::text = 'doing');
  if swept > 0 then
    perform pgscribe.wake_workers();
  end if;
  return swept;
end $$;
comment on function pgscribe.sweep_stalled_jobs is
  'Gives jobs of workers that have not been heard of for stall_timeout seconds back to the queue, or fails them after their last attempt; returns how many.';

create function pgscribe.beat(
  worker bigint, held bigint[], attempts integer[], held_queue_jobs bigint[],
  stall_timeout double precision, default_max_attempts integer, sweep boolean, echo_channel text default null) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
declare
  lost jsonb;
  orphans pgscribe.ended_attempt[];
  swept integer := 0;
begin
  update procrastinate.procrastinate_workers set last_heartbeat = now() where id = worker;
  if not found then
    return null;
  end if;
  select jsonb_agg(jsonb_build_array(h.id, h.attempt)) into lost from unnest(held, attempts) h (id, attempt)
   where not exists (select from public.processing_jobs p
                      where p.job_id = h.id::text and p.attempt = h.attempt and p.status || '' = 'processing');
  -- Claims whose answer never arrived.
  select array_agg(row(q.id, p.id, coalesce(p.attempt, q.attempts), 'released', null, null, null, null, null)::pgscribe.ended_attempt)
    into orphans
    from procrastinate.procrastinate_jobs q left join public.processing_jobs p on p.job_id = q.id::text
   where q.worker_id = worker and q.status::text = 'doing' and q.id <> all (held_queue_jobs);
  if orphans is not null then
    perform from pgscribe.end_attempts(worker, orphans, default_max_attempts);
    perform pgscribe.wake_workers();
  end if;
  if echo_channel is not null then
    perform pg_notify(echo_channel, '');
  end if;
  if sweep then
    swept := pgscribe.sweep_stalled_jobs(stall_timeout, default_max_attempts);
  end if;
  return (select jsonb_build_object(
      'lost', coalesce(lost, '[]'),
      'abort', (select coalesce(jsonb_agg(q.id), '[]') from procrastinate.procrastinate_jobs q
                 where q.worker_id = worker and q.status::text = 'doing' and q.abort_requested), 'orphans', coalesce(cardinality(orphans), 0), 'swept', swept,
      'workers', count(*), 'rank', count(*) filter (where w.id < worker),
      'stall', extract(epoch from min(w.last_heartbeat) filter (where w.id <> worker) - clock_timestamp()) + stall_timeout)
    from procrastinate.procrastinate_workers w);
end $$;
comment on function pgscribe.beat is
  'A worker''s heartbeat. Null once it has been presumed dead. lost: queue jobs and attempts that it no longer holds; stall: seconds until another worker may be presumed dead; workers and rank: how many there are and how many are older. The echo channel is notified, so that the worker knows whether its listener hears.';

create function pgscribe.sign_off(worker bigint) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform from pgscribe.beat(worker, '{}', '{}', '{}', 0, 1, false);
  perform procrastinate.procrastinate_unregister_worker_v1(worker);
end $$;
comment on function pgscribe.sign_off is 'Gives back what a stopping worker still holds, and forgets the worker.';

-- For operators ---------------------------------------------------------------------------------------------

create function public.pause_queue(queue_name text default 'transcription') returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  insert into pgscribe.queue_settings as s (queue_name, paused_at) values (pause_queue.queue_name, now())
  on conflict (queue_name) do update set paused_at = coalesce(s.paused_at, excluded.paused_at)
$$;
comment on function public.pause_queue is 'Starts no more jobs of a queue until resume_queue; running ones go on.';

create function public.resume_queue(queue_name text default 'transcription') returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  update pgscribe.queue_settings s set paused_at = null where s.queue_name = resume_queue.queue_name;
  select pgscribe.wake_workers();
$$;
comment on function public.resume_queue is 'Starts jobs of a paused queue again.';

create function public.pause_owner(owner_id uuid) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  insert into pgscribe.owner_limits as l (owner_id, paused_at) values (pause_owner.owner_id, now())
  on conflict (owner_id) do update set paused_at = coalesce(l.paused_at, excluded.paused_at)
$$;
comment on function public.pause_owner is 'Starts no more jobs of an owner until resume_owner; running ones go on.';

create function public.resume_owner(owner_id uuid) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  update pgscribe.owner_limits l set paused_at = null where l.owner_id = resume_owner.owner_id;
  -- They start level with the others, not with what they would have been given meanwhile.
  select from pgscribe.fair_queue for update;
  update pgscribe.owner_shares s set waiting = false where s.owner_id = resume_owner.owner_id;
  insert into pgscribe.woken_owners (owner_id) values (resume_owner.owner_id);
  select pgscribe.wake_workers();
$$;
comment on function public.resume_owner is 'Starts jobs of a paused owner again.';

create function public.limit_owner(owner_id uuid, max_running integer default null, weight real default null) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp as $$
  insert into pgscribe.owner_limits (owner_id, max_running, weight)
  values (limit_owner.owner_id, limit_owner.max_running, limit_owner.weight)
  on conflict (owner_id) do update set max_running = excluded.max_running, weight = excluded.weight;
  select pgscribe.wake_workers();
$$;
comment on function public.limit_owner is
  'Sets how many jobs an owner may have running (null: the queue''s default) and how large their share is (null: 1; 2 is twice the others'').';

revoke execute on function public.pause_queue, public.resume_queue, public.pause_owner, public.resume_owner, public.limit_owner
  from public, anon, authenticated;
grant execute on function public.pause_queue, public.resume_queue, public.pause_owner, public.resume_owner, public.limit_owner
  to service_role;

-- Retention -------------------------------------------------------------------------------------------------

create table pgscribe.retention (
  kind text primary key check (kind in ('queue_jobs', 'completed', 'failed', 'cancelled', 'audio')),
  pruned_until timestamptz not null default '-infinity'
);
insert into pgscribe.retention (kind) values ('queue_jobs'), ('completed'), ('failed'), ('cancelled'), ('audio');
comment on table pgscribe.retention is 'How far retention has come: what ended before that has been looked at.';

create function pgscribe.prune(what text, older_than interval, batch integer) returns integer
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
comment on function pgscribe.prune is
  'Deletes one batch of what ended longer ago than that, and returns how many: queue_jobs, or jobs that are completed, failed or cancelled.';

create function pgscribe.expired_audio(older_than interval, batch integer, out paths text[], out reached timestamptz)
language sql stable set search_path = pg_catalog, pg_temp as $$
  with old as (
    select p.file_path, p.completed_at from public.processing_jobs p
     where p.completed_at >= (select pruned_until from pgscribe.retention where kind = 'audio')
       and p.completed_at < now() - older_than
     order by p.completed_at fetch first (batch) rows with ties)
  select array(select distinct o.file_path from old o where not exists (
           select from public.processing_jobs p where p.file_path = o.file_path
              and (p.completed_at is null or p.completed_at >= now() - older_than))),
         (select max(completed_at) from old)
$$;
comment on function pgscribe.expired_audio is
  'Returns audio that only jobs have used that ended longer ago than that, and up to when the jobs have been looked at (null: nothing is left). Delete it, then call audio_pruned.';

create function pgscribe.audio_pruned(until timestamptz) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  update pgscribe.retention set pruned_until = greatest(pruned_until, until + interval '1 microsecond') where kind = 'audio'
$$;
comment on function pgscribe.audio_pruned is 'Notes that the audio of jobs that ended until then has been deleted.';

drop function pgscribe.lock_held_job;
revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
