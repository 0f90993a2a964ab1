-- Reports on a running job by code that is no worker: how far it has come, and a note to its owner.
-- docs/decisions/0003-calls.md says what they can do, and what they can't.

alter table public.processing_jobs
  add column note text check (length(note) between 1 and 500 and note !~ '[[:cntrl:]]');
comment on column public.processing_jobs.note is
  'What report_progress last said of the current attempt, for people. It stays once the job has ended; another attempt starts without it.';

create function pgscribe.refuse_report() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.reject(case when new.note is null then 'usage' else 'note' end, 'only pgscribe writes it, while the job runs',
    'Leave it out; for a note call report_progress(id, progress, note) once the job is processing.');
  return null;
end $$;
create trigger refuse_report before insert on public.processing_jobs
  for each row when (new.note is not null or new.usage is not null) execute function pgscribe.refuse_report();

-- Like progress and result, the note is about one attempt.
create function pgscribe.forget_note() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  new.note := null;
  return new;
end $$;
create trigger forget_note before update of attempt on public.processing_jobs
  for each row when (new.attempt > old.attempt and old.note is not null) execute function pgscribe.forget_note();

-- It takes one lock, on the job's row, like the worker's own write of progress: neither waits for anything else.
create function public.report_progress(id uuid, progress double precision default null, note text default null)
returns public.processing_jobs
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  job public.processing_jobs;
  -- Whoever counts what is done reports 1 at the end, and that is no mistake to fail on. But 1 says that there
  -- is a result to read, and only the queue knows.
  reached real := case when report_progress.progress is not null then least(report_progress.progress, 0.99) end;
begin
  if report_progress.progress not between 0 and 1 then  -- as is NaN
    perform pgscribe.reject('progress', 'must be from 0 to 1, not ' || report_progress.progress,
      'It is the share of the job that is done: 0.5 is half of it.');
  end if;
  if length(report_progress.note) > 500 or report_progress.note ~ '[[:cntrl:]]' then
    perform pgscribe.reject('note', 'must have at most 500 characters, none of them a control character',
      'It is one line for people; an empty one removes what is there.');
  end if;
  select * into job from public.processing_jobs p where p.id = report_progress.id for no key update;
  if job.id is null then
    perform pgscribe.reject('id', 'there is no such job', 'Give the id of a row of processing_jobs, not its job_id.');
  elsif job.status <> 'processing' then
    perform pgscribe.reject('status', format('is "%s", and reports are of jobs that are processing', job.status),
      'Status is derived from the queue; to change it call cancel_processing_job(id) or retry_processing_job(id).');
  end if;
  if reached > job.progress or report_progress.note is not null then
    update public.processing_jobs p set
        progress = greatest(p.progress, reached),
        note = case when report_progress.note is null then p.note else nullif(report_progress.note, '') end,
        updated_at = now()
     where p.id = report_progress.id
    returning p.* into job;
  end if;
  return job;
end $$;
comment on function public.report_progress is
  'Says of a processing job how far it has come (0 to 1, of which 1 counts as 0.99; it never goes back) and a note for its owner (up to 500 characters; empty: none; null: as it was). Returns the row. For service_role; workers write progress themselves.';

revoke execute on function public.report_progress from public, anon, authenticated;
grant execute on function public.report_progress to service_role;
revoke execute on function pgscribe.refuse_report, pgscribe.forget_note from public, anon, authenticated, service_role;
