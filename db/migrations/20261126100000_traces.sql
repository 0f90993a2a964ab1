-- Traces: a job says which trace it belongs to. docs/tracing.md shows how to see them,
-- docs/decisions/0010-traces-and-logs.md says why they are as they are.
--
-- Triggers of their own, which fire only where somebody gives the column: nobody else pays for it.

alter table public.processing_jobs add column traceparent text;
comment on column public.processing_jobs.traceparent is
  'The caller''s place in a trace, as W3C Trace Context has it: the job''s spans are its children. Null: the job is a trace of its own, whose id is the first 32 hexadecimal digits of the SHA-256 of the job''s.';
comment on table public.processing_jobs is
  'Transcription jobs. Insert a row to start one; everything but user_id, file_path, audio_url, webhook_url, options, scheduled_at, priority, idempotency_key, max_attempts and traceparent is written by pgscribe.';
grant insert (traceparent) on public.processing_jobs to authenticated, service_role;

create function pgscribe.check_traceparent() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if tg_op = 'UPDATE' then
    perform pgscribe.reject('traceparent', 'never changes once the job is inserted', 'Insert another job.');
  end if;
  if new.traceparent !~ '^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$' or new.traceparent ~ '^00-0{32}|-0{16}-' then
    perform pgscribe.reject('traceparent', 'must be 00-<trace id>-<parent id>-<flags> in small hexadecimal digits, 32, 16 and 2 of them, the ids not all zeros',
      'Give what your tracing library sends as the header traceparent, or leave it out: the job then starts a trace.');
  end if;
  return new;
end $$;
comment on function pgscribe.check_traceparent is 'Refuses a traceparent that is none, and one that changes.';
create trigger check_traceparent before insert on public.processing_jobs
  for each row when (new.traceparent is not null) execute function pgscribe.check_traceparent();
create trigger keep_traceparent before update of traceparent on public.processing_jobs
  for each row when (new.traceparent is distinct from old.traceparent) execute function pgscribe.check_traceparent();

create function pgscribe.job_trace(job uuid, attempt integer default null) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
           'job_id', p.id, 'traceparent', p.traceparent, 'run', extract(epoch from p.retry_requested_at)::text,
           'age', extract(epoch from now() - coalesce(p.retry_requested_at, p.created_at)),
           'waited', extract(epoch from now() - greatest(a.ended_at, p.retry_requested_at, p.created_at)),
           'max_attempts', p.max_attempts,
           -- One that failed its job was in another run, whose spans have other ids.
           'lost', case when a.error_code = 'worker_lost' and a.outcome = 'retried' then json_build_object(
             'began', extract(epoch from now() - a.started_at), 'ended', extract(epoch from now() - a.ended_at)) end)
    from public.processing_jobs p
    left join public.processing_job_attempts a on a.job_id = p.id and a.attempt = job_trace.attempt - 1
   where p.id = job_trace.job
$$;
comment on function pgscribe.job_trace is
  'What the spans of a job follow from: its traceparent and which run of it this is, and for an attempt how many seconds ago the run and the wait for this attempt began. lost: when the attempt before it in this run, whose worker died, began and ended.';

create function pgscribe.delivery_trace(delivery uuid) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select pgscribe.job_trace(d.job_id) from public.webhook_deliveries d where d.id = delivery_trace.delivery
$$;
comment on function pgscribe.delivery_trace is 'job_trace of the job that a delivery is about; null if there is none.';

revoke execute on function pgscribe.check_traceparent, pgscribe.job_trace, pgscribe.delivery_trace
  from public, anon, authenticated, service_role;
