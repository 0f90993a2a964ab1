-- Four things that were known to take too long, or to wait for somebody.

-- Lists of what has failed ----------------------------------------------------------------------------------------
-- While the statistics know of no failed job, the index of everybody's failed jobs looked as short to the planner as that of
-- one owner's, who then waited for everybody's to be read. The condition holds for every job, but only operators' queries
-- say so.

-- Dropped first, which takes the strongest lock: whoever takes a weaker one first, and then that, waits for those who have
-- read the table and want to write to it, who wait for them. The one below takes its place, in the same transaction.
-- squawk-ignore require-concurrent-index-deletion
drop index public.processing_jobs_not_completed_idx;
-- The table is neither read nor written while it is made, of the few jobs that failed or were cancelled.
-- squawk-ignore require-concurrent-index-creation
create index processing_jobs_ended_badly_idx on public.processing_jobs (status, created_at desc, id desc)
  where status in ('failed', 'cancelled') and attempt >= 0;

create or replace function pgscribe.newest_jobs(
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
  elsif wanted in ('queued', 'processing') then  -- not by everybody's newest: those may have been completed
    return query
      select p.id, p.created_at from public.processing_jobs p
       where p.status = wanted and (p.created_at, p.id) < (after_at, after_id)
         and (ended_before is null or p.completed_at + interval '0 s' < ended_before)
       order by p.created_at desc, p.id desc limit most;
  elsif wanted <> 'completed' then
    return query
      select p.id, p.created_at from public.processing_jobs p
       where p.status = wanted and p.attempt >= 0 and (p.created_at, p.id) < (after_at, after_id)
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

-- Heartbeats wait for nobody --------------------------------------------------------------------------------------

create or replace function pgscribe.beat(
  worker bigint, held bigint[], attempts integer[], held_queue_jobs bigint[],
  stall_timeout double precision, default_max_attempts integer, sweep boolean, echo_channel text default null) returns jsonb
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
declare
  lost jsonb;
  orphans pgscribe.ended_attempt[];
  busy bigint[];
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
  if exists (select from unnest(orphans) o where o.job_id is null) then
    -- A heartbeat waits for nobody: deliveries that somebody else has locked are given back with a later one.
    busy := pgscribe.busy_deliveries(array(select o.queue_job_id from unnest(orphans) o where o.job_id is null));
    orphans := (select array_agg(o) from unnest(orphans) o where o.queue_job_id <> all (busy));
  end if;
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

-- An endpoint is deleted at once, its deliveries by and by ---------------------------------------------------------
-- In one statement that takes seconds for each hundred thousand of them, and a user's statements have 8 s. So there is no
-- foreign key; what is left of a deleted endpoint is seen by nobody, is not sent, and goes within minutes.

-- Nobody relies on it: workers of the version before find no endpoint, and send nothing.
-- squawk-ignore ban-drop-constraint
alter table public.webhook_deliveries drop constraint webhook_deliveries_endpoint_id_fkey;

create table pgscribe.deleted_endpoints (
  endpoint_id uuid primary key,
  deleted_at timestamptz not null default now()
);
comment on table pgscribe.deleted_endpoints is 'Webhook endpoints that have been deleted, until their deliveries have been, too.';
comment on column pgscribe.deleted_endpoints.endpoint_id is 'The id that the endpoint had.';
comment on column pgscribe.deleted_endpoints.deleted_at is 'When it was deleted.';
revoke all on pgscribe.deleted_endpoints from public, anon, authenticated, service_role;

create function pgscribe.remember_deleted_endpoints() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  insert into pgscribe.deleted_endpoints (endpoint_id) select o.id from old_rows o
  on conflict (endpoint_id) do update set deleted_at = excluded.deleted_at;  -- it was made anew meanwhile, with the same id
  return null;
end $$;
comment on function pgscribe.remember_deleted_endpoints is 'Notes whose deliveries are to be deleted.';
create trigger remember_deleted_endpoints after delete on public.webhook_endpoints
  referencing old table as old_rows for each statement execute function pgscribe.remember_deleted_endpoints();

create function pgscribe.goes_with_its_endpoint(endpoint uuid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select endpoint is not null and not exists (select from public.webhook_endpoints e where e.id = endpoint)
$$;
comment on function pgscribe.goes_with_its_endpoint is 'Whether a delivery to this endpoint (null: to a URL of its own) is about to be deleted, since the endpoint is.';

create function pgscribe.forget_deliveries(patience interval) returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  endpoint uuid;
  busy uuid[] := '{}';
  deleted integer;
  total integer := 0;
begin
  loop
    select e.endpoint_id into endpoint from pgscribe.deleted_endpoints e
     where e.endpoint_id <> all (busy) order by e.deleted_at for update skip locked limit 1;
    exit when not found;
    -- By their ids, not by a join: that reads all there are for each, while the statistics know of none.
    delete from public.webhook_deliveries d where d.id = any (array(
      select x.id from public.webhook_deliveries x where x.endpoint_id = endpoint and pgscribe.goes_with_its_endpoint(endpoint)
       limit 1000 for update skip locked));
    get diagnostics deleted = row_count;
    total := total + deleted;
    if deleted = 0 and exists (
        select from public.webhook_deliveries d where d.endpoint_id = endpoint and pgscribe.goes_with_its_endpoint(endpoint)) then
      busy := busy || endpoint;
    elsif deleted = 0 then
      delete from pgscribe.deleted_endpoints e where e.endpoint_id = endpoint;
    end if;
    exit when clock_timestamp() > statement_timestamp() + patience;
  end loop;
  return total;
end $$;
comment on function pgscribe.forget_deliveries is
  'Deletes deliveries whose endpoint has been deleted, for about so long; returns how many. Those that somebody has locked are left for the next time.';

create or replace function pgscribe.forget_deleted_deliveries() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from procrastinate.procrastinate_jobs q
   where q.id = any (array(select o.queue_job_id from old_rows o)) and q.status::text <> 'doing';
  return null;
end $$;

drop policy "Owners see what they are told" on public.webhook_deliveries;
create policy "Owners see what they are told" on public.webhook_deliveries
  for select to authenticated
  using (user_id = (select auth.uid())
    and (endpoint_id is null or endpoint_id = any (array(select e.id from public.webhook_endpoints e where e.user_id = (select auth.uid())))));

create or replace function pgscribe.begin_delivery(delivery uuid) returns json
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  d public.webhook_deliveries;
  e public.webhook_endpoints;
  secrets text[];
  locked boolean := false;
begin
  select * into d from public.webhook_deliveries x where x.id = delivery;
  if d.id is null or d.succeeded_at is not null then
    return null;
  end if;
  select * into e from public.webhook_endpoints x where x.id = d.endpoint_id;
  if d.endpoint_id is not null and e.id is null then
    return null;
  elsif e.disabled_at is not null then
    return json_build_object('disabled', true);
  end if;
  loop
    secrets := array(select s.secret from pgscribe.webhook_secrets s
                      where s.user_id = d.user_id and s.endpoint_id is not distinct from d.endpoint_id
                        and (s.expires_at is null or s.expires_at > now())
                      order by s.id desc);
    exit when secrets <> '{}';
    -- Once nobody else makes one: their owner, who has seen it, must not have it replaced.
    if locked then
      perform pgscribe.new_webhook_secret(d.user_id, d.endpoint_id, '0');
    end if;
    perform pg_advisory_xact_lock(hashtextextended('pgscribe webhooks ' || d.user_id, 0));
    locked := true;
  end loop;
  return json_build_object('disabled', false, 'url', coalesce(d.url, e.url), 'payload', d.payload, 'secrets', secrets);
end $$;

create or replace function pgscribe.replay_deliveries(ids uuid[]) returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  d public.webhook_deliveries;
  replayed integer := 0;
begin
  for d in
    select * from public.webhook_deliveries x
     where x.id = any (ids) and x.status in ('delivered', 'failed')
       and (x.endpoint_id is null
            or exists (select from public.webhook_endpoints e where e.id = x.endpoint_id and e.disabled_at is null))
     order by x.created_at, x.id for update
  loop
    update public.webhook_deliveries x set succeeded_at = null where x.id = d.id;
    update procrastinate.procrastinate_jobs q
       set status = 'todo', attempts = 0, scheduled_at = null, abort_requested = false, worker_id = null
     where q.id = d.queue_job_id and q.status not in ('todo', 'doing');
    if not found then  -- retention has removed it
      d.queue_job_id := nextval('procrastinate.procrastinate_jobs_id_seq');
      update public.webhook_deliveries x set queue_job_id = d.queue_job_id where x.id = d.id;
      insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, args, status)
      values (d.queue_job_id, 'webhooks', 'deliver_webhook', jsonb_build_object('delivery_id', d.id), 'failed');
      update procrastinate.procrastinate_jobs q set status = 'todo' where q.id = d.queue_job_id;
    end if;
    replayed := replayed + 1;
  end loop;
  if replayed > 0 then
    perform pgscribe.wake_couriers();
  end if;
  return replayed;
end $$;

create or replace function public.replay_webhook_delivery(id uuid) returns public.webhook_deliveries
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  found_one public.webhook_deliveries;
begin
  select * into found_one from public.webhook_deliveries d
   where d.id = replay_webhook_delivery.id and (d.user_id = auth.uid() or not pgscribe.is_one_user() or pgscribe.is_operator())
     and not pgscribe.goes_with_its_endpoint(d.endpoint_id);
  if found_one.id is null then
    return null;
  end if;
  if exists (select from public.webhook_endpoints e where e.id = found_one.endpoint_id and e.disabled_at is not null) then
    perform pgscribe.reject('endpoint_id', 'is disabled, so nothing is sent to it', 'Enable it first: PATCH it with {"enabled": true}, or set its disabled_at to null.');
  end if;
  perform pgscribe.replay_deliveries(array[found_one.id]);
  select * into found_one from public.webhook_deliveries d where d.id = found_one.id;
  return found_one;
end $$;

create or replace function public.replay_webhook_deliveries(
  since timestamptz, until timestamptz default null, endpoint_id uuid default null, status text default 'failed') returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  if replay_webhook_deliveries.status not in ('failed', 'delivered') or replay_webhook_deliveries.status is null then
    perform pgscribe.reject('status', 'must be failed or delivered', 'Leave it out for failed.');
  end if;
  if since is null then
    perform pgscribe.reject('since', 'is missing', 'Give the time since when deliveries are to be sent again.');
  end if;
  return pgscribe.replay_deliveries(array(
    select d.id from public.webhook_deliveries d
     where d.user_id = auth.uid() and d.status = replay_webhook_deliveries.status
       and d.created_at >= since and d.created_at < coalesce(until, 'infinity')
       and (replay_webhook_deliveries.endpoint_id is null or d.endpoint_id = replay_webhook_deliveries.endpoint_id)
       -- As the policy has it: there may be hundreds of thousands whose endpoint is deleted.
       and (d.endpoint_id is null or d.endpoint_id = any (array(select e.id from public.webhook_endpoints e where e.user_id = auth.uid())))
     order by d.created_at, d.id limit 1000));
end $$;

create or replace function public.send_test_webhook(endpoint_id uuid) returns public.webhook_deliveries
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  e public.webhook_endpoints;
  d public.webhook_deliveries;
begin
  select * into e from public.webhook_endpoints x
   where x.id = send_test_webhook.endpoint_id and (x.user_id = auth.uid() or not pgscribe.is_one_user()) for key share;
  if e.id is null then
    return null;
  end if;
  if e.disabled_at is not null then
    perform pgscribe.reject('endpoint_id', 'is disabled, so nothing is sent to it', 'Enable it first: PATCH it with {"enabled": true}, or set its disabled_at to null.');
  end if;
  perform pg_advisory_xact_lock(hashtextextended('pgscribe webhooks ' || e.user_id, 0));
  if (select count(*) from public.webhook_deliveries x
       where x.user_id = e.user_id and x.event = 'webhook.test' and x.created_at > now() - interval '1 minute') >= 10 then
    perform pgscribe.refuse_over_limit('endpoint_id', 'has had 10 tests in a minute, which is the limit', 'Wait a minute.', 10, 10, 60);
  end if;
  insert into public.webhook_deliveries (user_id, endpoint_id, event, payload, queue_job_id)
  values (e.user_id, e.id, 'webhook.test',
          jsonb_build_object('type', 'webhook.test', 'timestamp', pgscribe.rfc3339(now()), 'data', jsonb_build_object('endpoint_id', e.id)),
          nextval('procrastinate.procrastinate_jobs_id_seq'))
  returning * into d;
  insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, args)
  values (d.queue_job_id, 'webhooks', 'deliver_webhook', jsonb_build_object('delivery_id', d.id));
  return d;
end $$;

create or replace function public.operator_deliveries(
  with_status text default 'failed', of_owner uuid default null, "limit" integer default 50,
  after_created_at timestamptz default null, after_id uuid default null)
returns table (
  id uuid, owner_id uuid, email text, endpoint_id uuid, job_id uuid, url text, event text, status text, attempts integer,
  created_at timestamptz, due_at timestamptz, completed_at timestamptz, response_status smallint, error_code text, error text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set plan_cache_mode = force_custom_plan as $$
begin
  perform pgscribe.require_operator();
  return query
    -- What follows the host may be a secret of the owner's.
    select d.id, d.user_id, u.email::text, d.endpoint_id, d.job_id, substring(coalesce(d.url, e.url) from '^https?://[^/?#]+'), d.event, d.status, d.attempts,
           d.created_at, d.due_at, d.completed_at, d.response_status, d.error_code, d.error
      from public.webhook_deliveries d
      left join public.webhook_endpoints e on e.id = d.endpoint_id
      left join auth.users u on u.id = d.user_id
     where d.status = with_status and d.status <> 'delivered' and (d.endpoint_id is null or e.id is not null)
       and (of_owner is null or d.user_id = of_owner)
       and (after_id is null or (d.created_at, d.id) < (after_created_at, after_id))
     order by d.created_at desc, d.id desc limit operator_deliveries."limit";
end $$;

-- Workers of any version call this once a minute.
create or replace function pgscribe.add_up_usage() returns integer
language sql volatile set search_path = pg_catalog, pg_temp as $$
  -- Before the lock on days, for which whoever retries or deletes jobs waits.
  select pgscribe.forget_deliveries(interval '2 s');
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
  'Adds what jobs have used since the last time to pgscribe.owner_usage, and what a day took that is over to pgscribe.daily_totals; deletes what is left of deleted endpoints. Returns of how many entries of usage.';

-- A user is deleted while a job of theirs ends ----------------------------------------------------------------------

create or replace function pgscribe.end_attempts(
  worker bigint, ended pgscribe.ended_attempt[], default_max_attempts integer,
  out held uuid[], out owners uuid[], out corrections double precision[], out lengths double precision[])
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  -- The fence: the row of a claim that is still good. What somebody else has locked is left for later. That goes for its
  -- owner, too: whose foreign key is checked as a row is updated twice, and who, when deleted, waits for this row.
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
        join auth.users u on u.id = p.user_id
       where p.attempt = e.attempt and p.status || '' = 'processing'  -- by its id, not by an index of all running ones
         for update of p, q skip locked
         for key share of u skip locked) l;
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

revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
grant execute on function pgscribe.search_document(uuid, jsonb) to authenticated, service_role;
grant execute on function
  pgscribe.email_for_reader, pgscribe.worker_of, pgscribe.is_held_back, pgscribe.share_of, pgscribe.ahead_in_line, pgscribe.queue_health
  to authenticated, service_role, pg_read_all_data;
