-- Who set the mirror's switch by hand could write a status as the tables' owner. The mirror writes from within a trigger, and
-- nobody's own statement is within one: the guards ask for both.

create or replace trigger guard_processing_job before update on public.processing_jobs
  for each row when (new.updated_at = old.updated_at
    or (new.id, new.created_at, new.user_id, new.file_path, new.audio_url, new.webhook_url, new.options, new.scheduled_at,
        new.idempotency_key, new.cancel_requested_at, new.retry_requested_at) is distinct from
       (old.id, old.created_at, old.user_id, old.file_path, old.audio_url, old.webhook_url, old.options, old.scheduled_at,
        old.idempotency_key, old.cancel_requested_at, old.retry_requested_at)
    or ((new.status, new.job_id) is distinct from (old.status, old.job_id)
        and (pg_trigger_depth() = 0 or current_setting('pgscribe.mirroring', true) is distinct from 'on')))
  execute function pgscribe.guard_processing_job();

create or replace function pgscribe.guard_webhook_delivery() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  -- Depth 1 is this trigger itself.
  if new.status <> old.status and (pg_trigger_depth() = 1 or current_setting('pgscribe.mirroring', true) is distinct from 'on') then
    perform pgscribe.reject('status', 'follows the queue job', 'Call replay_webhook_delivery(id).');
  end if;
  new.updated_at := now();
  return new;
end $$;
