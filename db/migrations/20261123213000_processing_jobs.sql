-- The job: a row of public.processing_jobs. Its queue job is written by a trigger in the same
-- transaction (one door), and its status is derived from the queue job's by a trigger (one truth).
-- Runs as `postgres` of a hosted Supabase project, which is no superuser.

--
-- Every function sets search_path = pg_catalog, pg_temp. An empty one would not do: pg_temp would
-- then come first, and a caller's temporary type named `text` would run its code as `postgres`.

create schema if not exists pgscribe;
comment on schema pgscribe is 'Helpers of pgscribe. Not exposed: no API role has access.';

create table public.processing_jobs (
  id uuid primary key default gen_random_uuid(),
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  scheduled_at timestamptz,
  started_at timestamptz,
  completed_at timestamptz,
  user_id uuid not null default auth.uid() references auth.users (id) on delete cascade,
  job_id text unique,
  file_path text not null,
  options jsonb not null default '{}',
  status text not null default 'queued'
    check (status in ('queued', 'processing', 'completed', 'failed', 'cancelled')),
  progress real not null default 0 check (progress between 0 and 1),
  attempt integer not null default 0,
  audio_seconds double precision check (audio_seconds >= 0 and audio_seconds < 'Infinity'),
  result jsonb,
  error_code text,
  error text,
  constraint completed_has_a_result check (status <> 'completed' or coalesce(jsonb_typeof(result), '') = 'object'),
  constraint failed_has_a_reason check (status <> 'failed' or (error_code is not null and error is not null))
);

comment on table public.processing_jobs is
  'Transcription jobs. Insert a row to start one; everything but user_id, file_path, options and scheduled_at is written by pgscribe.';
comment on column public.processing_jobs.id is 'The job''s id.';
comment on column public.processing_jobs.created_at is 'When the row was inserted.';
comment on column public.processing_jobs.updated_at is 'When the row last changed.';
comment on column public.processing_jobs.scheduled_at is 'Start no earlier than this; null: at once.';
comment on column public.processing_jobs.started_at is 'When the current attempt was claimed by a worker.';
comment on column public.processing_jobs.completed_at is 'When the job ended: completed, failed or cancelled.';
comment on column public.processing_jobs.user_id is 'The owner, who alone sees the job.';
comment on column public.processing_jobs.job_id is 'Id of the queue job in procrastinate.procrastinate_jobs.';
comment on column public.processing_jobs.file_path is 'Path of the audio in storage; an owner''s own uploads lie under <user_id>/.';
comment on column public.processing_jobs.options is
  'model, language, task (transcribe | translate), word_timestamps, initial_prompt, temperature, preprocessing.';
comment on column public.processing_jobs.status is
  'queued, processing, completed, failed or cancelled. Derived from the queue job; never write it.';
comment on column public.processing_jobs.progress is 'Share of the audio transcribed by the current attempt, 0 to 1.';
comment on column public.processing_jobs.attempt is 'How many times a worker has started the job.';
comment on column public.processing_jobs.audio_seconds is 'Length of the audio, once known.';
comment on column public.processing_jobs.result is 'The transcript: text, language, duration, segments.';
comment on column public.processing_jobs.error_code is 'Stable code of the last attempt''s error.';
comment on column public.processing_jobs.error is 'The last attempt''s error, for people.';

-- An owner's list, newest first.
create index processing_jobs_owner_idx on public.processing_jobs (user_id, created_at desc, id desc);

-- What an insert may say -------------------------------------------------------------------------

create function pgscribe.reject(field text, problem text, hint text) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  raise check_violation using
    message = format('%s: %s', field, problem), hint = hint,
    schema = 'public', table = 'processing_jobs', column = field;
end $$;
comment on function pgscribe.reject is 'Refuses a row, naming the field, what is wrong with it and the way out.';

create function pgscribe.check_options(options jsonb) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  key text;
  value jsonb;
  kind text;
  txt text;
  expected text;
begin
  if jsonb_typeof(options) <> 'object' then
    perform pgscribe.reject('options', 'must be a JSON object, not ' || jsonb_typeof(options), 'Leave it out for the defaults.');
  end if;
  for key, value in select * from jsonb_each(options) loop
    kind := jsonb_typeof(value);
    txt := value #>> '{}';
    expected := case key
      when 'model' then case when kind = 'string' and length(txt) <= 200
          and txt ~ '^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$' and strpos(txt, '..') = 0
        then null else 'a model name such as "base" or "large-v3"' end
      when 'language' then case when kind = 'null' or (kind = 'string' and txt ~ '^[a-z]{2,3}$')
        then null else 'a language code such as "en", or null to detect it' end
      when 'task' then case when kind = 'string' and txt in ('transcribe', 'translate')
        then null else '"transcribe" or "translate"' end
      when 'word_timestamps' then case when kind = 'boolean' then null else 'true or false' end
      when 'preprocessing' then case when kind = 'boolean' then null else 'true or false' end
      when 'initial_prompt' then case when kind = 'null' or (kind = 'string' and length(txt) <= 2000)
        then null else 'a text of at most 2000 characters, or null' end
      when 'temperature' then case when kind = 'null' then null
        when kind <> 'number' then 'a number from 0 to 1, or null'
        when txt::numeric between 0 and 1 then null else 'a number from 0 to 1, or null' end
      else '' end;
    if expected = '' then
      perform pgscribe.reject('options.' || left(key, 60), 'unknown option',
        'Known options: initial_prompt, language, model, preprocessing, task, temperature, word_timestamps.');
    elsif expected is not null then
      perform pgscribe.reject('options.' || key, format('must be %s, not %s', expected, left(value::text, 60)),
        'Leave it out for the default.');
    end if;
  end loop;
end $$;
comment on function pgscribe.check_options is 'Refuses transcription options with an unknown key, a wrong type or a value out of range.';

create function pgscribe.check_file_path(file_path text) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  if file_path ~ '^[a-z]+://' then
    perform pgscribe.reject('file_path', 'is a URL', 'Put the audio in storage and give its path there.');
  elsif length(file_path) not between 1 and 1024
      or file_path ~ '(^|/)\.{0,2}(/|$)'  -- an empty, "." or ".." part; a slash at either end
      or file_path ~ '[[:cntrl:]\\]' then
    perform pgscribe.reject('file_path', 'must be a relative path of 1 to 1024 characters without "..", empty parts, backslashes or control characters',
      'Use the path that the upload returned, such as <user_id>/<name>.mp3.');
  end if;
end $$;
comment on function pgscribe.check_file_path is 'Refuses a storage path that could lead out of its folder.';

create function pgscribe.check_processing_job() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if (new.job_id, new.started_at, new.completed_at, new.audio_seconds, new.result, new.error_code, new.error) is distinct from
      (null::text, null::timestamptz, null::timestamptz, null::float8, null::jsonb, null::text, null::text)
      or (new.status, new.progress, new.attempt) is distinct from ('queued'::text, 0::real, 0) then
    perform pgscribe.reject('status', 'only pgscribe writes status, progress, attempt, result, error and the times',
      'Insert user_id, file_path, options and scheduled_at.');
  end if;
  if new.scheduled_at not between '2000-01-01' and now() + interval '1 year' then
    perform pgscribe.reject('scheduled_at', 'must be at most a year ahead', 'Leave it out to start at once.');
  end if;
  perform pgscribe.check_file_path(new.file_path);
  perform pgscribe.check_options(new.options);
  return new;
end $$;
create trigger check_processing_job before insert on public.processing_jobs
  for each row execute function pgscribe.check_processing_job();

-- One door: whoever inserts a row gets its queue job in the same transaction ----------------------

create function pgscribe.defer_processing_jobs() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  queue_job_ids bigint[];
begin
  select procrastinate.procrastinate_defer_jobs_v1(array_agg(
    row('transcription', 'transcribe', 0, null, null, jsonb_build_object('processing_job_id', id), scheduled_at)
      ::procrastinate.procrastinate_job_to_defer_v1))
    into queue_job_ids from new_rows having count(*) > 0;
  update public.processing_jobs p set job_id = q.id
    from procrastinate.procrastinate_jobs q
   where q.id = any (queue_job_ids) and p.id = (q.args ->> 'processing_job_id')::uuid;
  return null;
end $$;
create trigger defer_processing_jobs after insert on public.processing_jobs
  referencing new table as new_rows for each statement execute function pgscribe.defer_processing_jobs();

create function pgscribe.abort_deleted_processing_jobs() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform procrastinate.procrastinate_cancel_job_v1(job_id::bigint, true, false)
    from old_rows where status in ('queued', 'processing');
  return null;
end $$;
create trigger abort_deleted_processing_jobs after delete on public.processing_jobs
  referencing old table as old_rows for each statement execute function pgscribe.abort_deleted_processing_jobs();

-- One truth: status is what the queue says ---------------------------------------------------------
--
--   queue job:       todo --------> doing -----> succeeded | failed | cancelled, aborted
--   processing job:  queued ----> processing --> completed | failed | cancelled
--                      ^______________|  (another attempt)

create function pgscribe.job_status(status procrastinate.procrastinate_job_status) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case status
    when 'todo' then 'queued'
    when 'doing' then 'processing'
    when 'succeeded' then 'completed'
    when 'failed' then 'failed'
    else 'cancelled' end
$$;
comment on function pgscribe.job_status is 'The processing job''s status for a queue job''s.';

create function pgscribe.mirror_queue_status() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  update public.processing_jobs p set
      status = pgscribe.job_status(n.status),
      attempt = p.attempt + (n.status = 'doing')::integer,
      started_at = case n.status when 'doing' then now() else p.started_at end,
      completed_at = case when n.status not in ('todo', 'doing') then now() end,
      result = case n.status when 'doing' then null else p.result end,
      progress = case n.status when 'doing' then 0 when 'succeeded' then 1 else p.progress end,
      error_code = case n.status when 'succeeded' then null when 'failed' then coalesce(p.error_code, 'internal_error')
        else p.error_code end,
      error = case n.status when 'succeeded' then null
        when 'failed' then coalesce(p.error, 'The attempt ended without saying why.') else p.error end
    from new_rows n join old_rows o on o.id = n.id
   where n.status is distinct from o.status and p.job_id = n.id::text;
  return null;
end $$;
create trigger pgscribe_mirror_queue_status after update on procrastinate.procrastinate_jobs
  referencing old table as old_rows new table as new_rows
  for each statement execute function pgscribe.mirror_queue_status();

create function pgscribe.mirror_queue_deletion() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  update public.processing_jobs p set
      status = 'cancelled', completed_at = now(),
      error_code = 'queue_job_deleted', error = 'The queue job was deleted before the job ended.'
    from old_rows o
   where p.job_id = o.id::text and p.status in ('queued', 'processing');
  return null;
end $$;
create trigger pgscribe_mirror_queue_deletion after delete on procrastinate.procrastinate_jobs
  referencing old table as old_rows for each statement execute function pgscribe.mirror_queue_deletion();

create function pgscribe.guard_processing_job() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  derived text;
  changed text := case
    when new.id <> old.id then 'id'
    when new.created_at <> old.created_at then 'created_at'
    when new.user_id <> old.user_id then 'user_id'
    when new.file_path <> old.file_path then 'file_path'
    when new.scheduled_at is distinct from old.scheduled_at then 'scheduled_at'
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
    if new.status <> coalesce(derived, old.status) or new.job_id is distinct from coalesce(old.job_id, new.job_id) then
      perform pgscribe.reject('status', format('is derived from the queue job, which says "%s"', coalesce(derived, old.status)),
        'Cancel or retry the queue job instead.');
    end if;
  end if;
  new.updated_at := now();
  return new;
end $$;
create trigger guard_processing_job before update on public.processing_jobs
  for each row execute function pgscribe.guard_processing_job();

-- Truncating fires no row's trigger: either table alone would be left with half of each job.
create function pgscribe.refuse_truncate() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise feature_not_supported using
    message = format('%I.%I holds half of each job and is not to be truncated', tg_table_schema, tg_table_name),
    hint = 'Delete from public.processing_jobs instead.';
end $$;
create trigger pgscribe_refuse_truncate before truncate on public.processing_jobs
  for each statement execute function pgscribe.refuse_truncate();
create trigger pgscribe_refuse_truncate before truncate on procrastinate.procrastinate_jobs
  for each statement execute function pgscribe.refuse_truncate();

-- Late writers lose: an attempt writes to its job only while it holds it -----------------------------

create function pgscribe.lock_held_job(queue_job_id bigint, worker_id bigint, attempts integer)
returns table (job_id text)
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select q.id::text
    from procrastinate.procrastinate_jobs q
   where q.id = queue_job_id and q.status = 'doing'
     and q.worker_id = lock_held_job.worker_id and q.attempts = lock_held_job.attempts
     for update
$$;
comment on function pgscribe.lock_held_job is
  'Locks the queue job of an attempt and returns its id as text; no row once the attempt has lost the job.';

-- Who may: RLS decides, column grants limit what an insert can say --------------------------------

alter table public.processing_jobs enable row level security;

create policy "Owners see their jobs" on public.processing_jobs
  for select to authenticated using (user_id = (select auth.uid()));
create policy "Owners insert jobs for audio in their own folder" on public.processing_jobs
  for insert to authenticated
  with check (user_id = (select auth.uid()) and split_part(file_path, '/', 1) = (select auth.uid())::text);

revoke all on public.processing_jobs from public, anon, authenticated, service_role;
grant select, insert (user_id, file_path, options, scheduled_at) on public.processing_jobs to authenticated;
grant select, delete, insert (user_id, file_path, options, scheduled_at) on public.processing_jobs to service_role;

revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
revoke all on schema pgscribe from public, anon, authenticated, service_role;
