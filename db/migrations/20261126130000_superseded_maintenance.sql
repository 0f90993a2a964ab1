-- Maintenance is deferred each minute, and its queueing_lock lets one job of a kind wait. A worker that died holding one left
-- it to the sweep, which gave it back to the queue: beside one of a later minute, or with another of its own, the unique index
-- refused that, and with it the whole sweep, again and again, so that no job of any dead worker started again.

create function pgscribe.drop_superseded_job() returns trigger
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  -- Rows that the same statement has given back before are seen, too.
  if exists (select from procrastinate.procrastinate_jobs q
              where q.queueing_lock = new.queueing_lock and q.status = 'todo' and q.id <> new.id) then
    new.status := 'aborted';
    new.scheduled_at := null;
  end if;
  return new;
end $$;
comment on function pgscribe.drop_superseded_job is
  'Ends a queue job that is given back while another one with its queueing_lock waits, which will do what it would have done.';
revoke execute on function pgscribe.drop_superseded_job from public, anon, authenticated, service_role;

create trigger pgscribe_drop_superseded_job before update of status on procrastinate.procrastinate_jobs
  for each row when (new.queueing_lock is not null and new.status = 'todo' and old.status <> 'todo')
  execute function pgscribe.drop_superseded_job();
