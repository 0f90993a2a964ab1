-- Webhooks: who is told over HTTP that a job has ended. docs/webhooks.md shows how to use them,
-- docs/decisions/0007-webhooks.md says why they are as they are.
--
-- A delivery is a row with a queue job of its own, written in the transaction that ends the job. Its status follows the
-- queue job, as that of processing_jobs does.

alter table pgscribe.api_keys drop constraint api_keys_scopes_check, add constraint api_keys_scopes_check check (
  cardinality(scopes) > 0 and array_position(scopes, null) is null
  and scopes <@ array['jobs:read', 'jobs:write', 'audio:read', 'audio:write', 'webhooks:read', 'webhooks:write', 'operate']);

-- Endpoints ------------------------------------------------------------------------------------------------------

create table public.webhook_endpoints (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null default auth.uid() references auth.users (id) on delete cascade,
  url text not null,
  events text[] not null default '{job.completed,job.failed,job.cancelled}',
  description text,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  disabled_at timestamptz,
  disabled_reason text check (disabled_reason in ('owner', 'gone', 'failing'))
);
create index webhook_endpoints_user_idx on public.webhook_endpoints (user_id);
comment on table public.webhook_endpoints is
  'Where an owner is told that jobs have ended, by signed HTTP requests. Insert url, events and description, or call create_webhook_endpoint, which returns the secret, too.';
comment on column public.webhook_endpoints.id is 'The endpoint.';
comment on column public.webhook_endpoints.user_id is 'Whose jobs it is about.';
comment on column public.webhook_endpoints.url is 'Where requests go: http or https, at most 2048 characters.';
comment on column public.webhook_endpoints.events is 'What it is told of: job.completed, job.failed, job.cancelled.';
comment on column public.webhook_endpoints.description is 'The owner''s own note, at most 200 characters.';
comment on column public.webhook_endpoints.created_at is 'When it was made.';
comment on column public.webhook_endpoints.updated_at is 'When it last changed.';
comment on column public.webhook_endpoints.disabled_at is 'Since when nothing is sent to it; null: it is enabled. Set it, or set it to null, to change that.';
comment on column public.webhook_endpoints.disabled_reason is
  'Why nothing is sent to it: owner (who has set disabled_at), gone (it answered 410), failing (a delivery failed for good, and none has succeeded meanwhile).';

create table pgscribe.webhook_secrets (
  id bigint primary key generated always as identity,
  user_id uuid not null references auth.users (id) on delete cascade,
  endpoint_id uuid references public.webhook_endpoints (id) on delete cascade,
  secret text not null,
  created_at timestamptz not null default now(),
  expires_at timestamptz
);
create unique index webhook_secrets_current_idx on pgscribe.webhook_secrets (user_id, endpoint_id) nulls not distinct
  where expires_at is null;
create index webhook_secrets_endpoint_idx on pgscribe.webhook_secrets (endpoint_id);
comment on table pgscribe.webhook_secrets is
  'What requests are signed with: one secret of each endpoint, one of each owner for the webhook_url of jobs (endpoint_id null), and for a while those before them. No API role has access.';
revoke all on pgscribe.webhook_secrets from public, anon, authenticated, service_role;

create function pgscribe.check_webhook_endpoint() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if new.user_id is null then
    perform pgscribe.reject('user_id', 'is missing', 'Give the owner''s id.');
  end if;
  perform pgscribe.check_url('url', new.url);
  if cardinality(new.events) = 0 or not new.events <@ array['job.completed', 'job.failed', 'job.cancelled']
      or array_position(new.events, null) is not null then
    perform pgscribe.reject('events', 'must name one or more of job.completed, job.failed and job.cancelled', 'Leave it out for all of them.');
  end if;
  new.events := array(select distinct e from unnest(new.events) e order by e);
  if length(new.description) > 200 then
    perform pgscribe.reject('description', 'must have at most 200 characters, not ' || length(new.description), 'Make it shorter.');
  end if;
  if tg_op = 'INSERT' then
    -- One at a time for each owner, so that two do not both take the last place.
    perform pg_advisory_xact_lock(hashtextextended('pgscribe webhooks ' || new.user_id, 0));
    if (select count(*) from public.webhook_endpoints e where e.user_id = new.user_id) >= 10 then
      perform pgscribe.reject('url', 'would be the eleventh endpoint; the limit is 10', 'Delete one, or change its URL.');
    end if;
    new.created_at := now();
  elsif new.user_id <> old.user_id then
    perform pgscribe.reject('user_id', 'never changes', 'Make another endpoint.');
  end if;
  new.updated_at := now();
  new.disabled_reason := case when new.disabled_at is null then null
    when tg_op = 'UPDATE' and old.disabled_at is not null then old.disabled_reason
    when current_setting('pgscribe.disabling', true) in ('gone', 'failing') then current_setting('pgscribe.disabling', true)
    else 'owner' end;
  new.disabled_at := case when new.disabled_at is not null then
    case when tg_op = 'UPDATE' then coalesce(old.disabled_at, now()) else now() end end;
  return new;
end $$;
create trigger check_webhook_endpoint before insert or update on public.webhook_endpoints
  for each row execute function pgscribe.check_webhook_endpoint();

alter table public.webhook_endpoints enable row level security;
create policy "Owners have webhook endpoints" on public.webhook_endpoints
  for all to authenticated using (user_id = (select auth.uid())) with check (user_id = (select auth.uid()));
revoke all on public.webhook_endpoints from public, anon, authenticated, service_role;
grant select, delete, insert (user_id, url, events, description), update (url, events, description, disabled_at)
  on public.webhook_endpoints to authenticated;
grant select, delete, insert (id, user_id, url, events, description), update (url, events, description, disabled_at)
  on public.webhook_endpoints to service_role;

-- 244 random bits, hashed into 256: gen_random_uuid is the one strong generator that Postgres has without an extension.
create function pgscribe.new_webhook_secret(owner uuid, endpoint uuid, keep interval) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  made text := 'whsec_' || encode(sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())), 'base64');
begin
  perform pg_advisory_xact_lock(hashtextextended('pgscribe webhooks ' || owner, 0));
  delete from pgscribe.webhook_secrets s
   where s.user_id = owner and s.endpoint_id is not distinct from endpoint and s.expires_at is not null;
  update pgscribe.webhook_secrets s set expires_at = now() + keep
   where s.user_id = owner and s.endpoint_id is not distinct from endpoint;
  insert into pgscribe.webhook_secrets (user_id, endpoint_id, secret) values (owner, endpoint, made);
  return made;
end $$;
comment on function pgscribe.new_webhook_secret is
  'Makes a secret and returns it. The one before it is used as well for so long; any older one is gone.';

create function public.rotate_webhook_secret(endpoint_id uuid default null, keep interval default '24 hours') returns text
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  owner uuid := auth.uid();
begin
  if keep is null or keep < interval '0' or keep > interval '7 days' then
    perform pgscribe.reject('keep', 'must be from 0 to 7 days', 'Leave it out for 24 hours.');
  end if;
  if rotate_webhook_secret.endpoint_id is not null then
    owner := (select e.user_id from public.webhook_endpoints e
               where e.id = rotate_webhook_secret.endpoint_id and (e.user_id = auth.uid() or not pgscribe.is_one_user()));
  end if;
  if owner is null then
    perform pgscribe.reject('endpoint_id', 'is no endpoint of yours', 'select id, url from webhook_endpoints');
  end if;
  return pgscribe.new_webhook_secret(owner, rotate_webhook_secret.endpoint_id, keep);
end $$;
comment on function public.rotate_webhook_secret is
  'Makes a new secret for an endpoint, or without one for the webhook_url of your jobs, and returns it: this once. Requests are signed with the one before it, too, for as long as keep says.';

-- All others see everything anyway. A role of one's own that is a member of authenticated does not.
create function pgscribe.is_one_user() returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
  select not exists (
    select from pg_roles r
     where r.rolname = coalesce(nullif(current_setting('role', true), 'none'), session_user)
       and (r.rolsuper or r.rolbypassrls or pg_has_role(r.oid, (
         select c.relowner from pg_class c where c.oid = 'public.webhook_endpoints'::regclass), 'usage')))
$$;
comment on function pgscribe.is_one_user is 'Whether row level security applies to the caller, also inside of a function that runs as its owner.';

create function public.create_webhook_endpoint(
  url text, events text[] default '{job.completed,job.failed,job.cancelled}', description text default null,
  user_id uuid default auth.uid()) returns json
language plpgsql volatile security invoker set search_path = pg_catalog, pg_temp as $$
declare
  made public.webhook_endpoints;
begin
  insert into public.webhook_endpoints (user_id, url, events, description)
  values (create_webhook_endpoint.user_id, create_webhook_endpoint.url, create_webhook_endpoint.events, create_webhook_endpoint.description)
  returning * into made;
  return to_jsonb(made) || jsonb_build_object('secret', public.rotate_webhook_secret(made.id, '0'));
end $$;
comment on function public.create_webhook_endpoint is
  'Makes an endpoint and returns it with its secret, which is not shown again: rotate_webhook_secret makes another one.';

revoke execute on function public.rotate_webhook_secret, public.create_webhook_endpoint from public, anon;
grant execute on function public.rotate_webhook_secret, public.create_webhook_endpoint to authenticated, service_role;

-- Deliveries ------------------------------------------------------------------------------------------------------

create table public.webhook_deliveries (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references auth.users (id) on delete cascade,
  endpoint_id uuid references public.webhook_endpoints (id) on delete cascade,
  job_id uuid references public.processing_jobs (id) on delete set null,
  url text,
  event text not null,
  payload jsonb not null,
  status text not null default 'queued' check (status in ('queued', 'sending', 'delivered', 'failed')),
  attempts integer not null default 0,
  queue_job_id bigint,
  created_at timestamptz not null default now(),
  updated_at timestamptz not null default now(),
  due_at timestamptz,
  completed_at timestamptz,
  succeeded_at timestamptz,
  response_status smallint,
  error_code text,
  error text,
  check ((url is null) = (endpoint_id is not null))
) with (fillfactor = 70);
comment on table public.webhook_deliveries is 'What owners are told by webhook, once to each endpoint; only pgscribe writes it. replay_webhook_delivery sends one again.';
comment on column public.webhook_deliveries.id is 'The delivery: the webhook-id of each of its requests, by which a receiver knows what it has had.';
comment on column public.webhook_deliveries.user_id is 'Who is told.';
comment on column public.webhook_deliveries.endpoint_id is 'Where; null: at url.';
comment on column public.webhook_deliveries.job_id is 'The job that it is about; null: that has been deleted, or it is a test.';
comment on column public.webhook_deliveries.url is 'The job''s own webhook_url; null: the endpoint''s, as it is when it is sent.';
comment on column public.webhook_deliveries.event is 'job.completed, job.failed, job.cancelled, or webhook.test.';
comment on column public.webhook_deliveries.payload is 'What is sent: type, timestamp and data, but for the link to the job.';
comment on column public.webhook_deliveries.status is 'queued, sending, delivered or failed; follows the queue job.';
comment on column public.webhook_deliveries.attempts is 'Requests so far of which it is known what came.';
comment on column public.webhook_deliveries.queue_job_id is 'Id of the queue job in procrastinate.procrastinate_jobs.';
comment on column public.webhook_deliveries.created_at is 'When the job ended.';
comment on column public.webhook_deliveries.updated_at is 'When it last changed.';
comment on column public.webhook_deliveries.due_at is 'It waits for this time before the next attempt; null: it may start now.';
comment on column public.webhook_deliveries.completed_at is 'When it was delivered, or given up.';
comment on column public.webhook_deliveries.succeeded_at is 'When a receiver took it.';
comment on column public.webhook_deliveries.response_status is 'HTTP status of the last answer.';
comment on column public.webhook_deliveries.error_code is 'Stable code of what was wrong with the last attempt.';
comment on column public.webhook_deliveries.error is 'What was wrong with the last attempt, for people.';

-- An owner's, newest first; those that may start; those that wait; those under way; those of an endpoint and of a job.
create index webhook_deliveries_user_idx on public.webhook_deliveries (user_id, created_at desc, id desc);
create index webhook_deliveries_ready_idx on public.webhook_deliveries (user_id, created_at, id) where status = 'queued' and due_at is null;
create index webhook_deliveries_due_idx on public.webhook_deliveries (due_at) where status = 'queued' and due_at is not null;
create index webhook_deliveries_sending_idx on public.webhook_deliveries (user_id) where status = 'sending';
create index webhook_deliveries_endpoint_idx on public.webhook_deliveries (endpoint_id, succeeded_at) where endpoint_id is not null;
create index webhook_deliveries_job_idx on public.webhook_deliveries (job_id) where job_id is not null;
create index webhook_deliveries_completed_idx on public.webhook_deliveries (completed_at) where completed_at is not null;
create index webhook_deliveries_failed_idx on public.webhook_deliveries (created_at desc, id desc) where status = 'failed';

create table public.webhook_attempts (
  delivery_id uuid not null references public.webhook_deliveries (id) on delete cascade,
  attempt integer not null,
  started_at timestamptz not null,
  seconds double precision not null,
  response_status smallint,
  response_excerpt text,
  error_code text,
  error text,
  primary key (delivery_id, attempt)
);
comment on table public.webhook_attempts is 'The requests that were made of each delivery, and what came back.';
comment on column public.webhook_attempts.delivery_id is 'The delivery.';
comment on column public.webhook_attempts.attempt is 'The attempt''s number, from 1.';
comment on column public.webhook_attempts.started_at is 'When it began.';
comment on column public.webhook_attempts.seconds is 'How long it took.';
comment on column public.webhook_attempts.response_status is 'HTTP status of the answer; null: there was none.';
comment on column public.webhook_attempts.response_excerpt is 'How the answer began, where it was not what was hoped for: at most 500 characters.';
comment on column public.webhook_attempts.error_code is 'Stable code of what was wrong; null: it was taken.';
comment on column public.webhook_attempts.error is 'What was wrong, for people.';

alter table public.webhook_deliveries enable row level security;
alter table public.webhook_attempts enable row level security;
create policy "Owners see what they are told" on public.webhook_deliveries
  for select to authenticated using (user_id = (select auth.uid()));
create policy "Owners see how they were told" on public.webhook_attempts
  for select to authenticated
  using (exists (select from public.webhook_deliveries d where d.id = webhook_attempts.delivery_id and d.user_id = (select auth.uid())));
revoke all on public.webhook_deliveries, public.webhook_attempts from public, anon, authenticated, service_role;
grant select on public.webhook_deliveries, public.webhook_attempts to authenticated, service_role;

-- What an ended job says, and to whom -------------------------------------------------------------------------------

create function pgscribe.tell_of_ended_jobs() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  -- Most updates are of jobs that wait or run, and most owners want to be told of nothing.
  if not exists (select from new_rows n where n.completed_at is not null and (n.webhook_url is not null
       or exists (select from public.webhook_endpoints w where w.user_id = n.user_id))) then
    return null;
  end if;
  with ended as (
    select n.id, n.user_id, n.webhook_url, 'job.' || n.status as event,
           jsonb_build_object(
             'type', 'job.' || n.status,
             'timestamp', pgscribe.rfc3339(n.completed_at),
             'data', jsonb_strip_nulls(jsonb_build_object(
               'id', n.id, 'status', n.status, 'file_path', n.file_path, 'idempotency_key', n.idempotency_key,
               'created_at', pgscribe.rfc3339(n.created_at), 'completed_at', pgscribe.rfc3339(n.completed_at),
               'audio_seconds', n.audio_seconds, 'attempt', n.attempt, 'error_code', n.error_code, 'error', n.error))) as payload
      from new_rows n join old_rows o using (id)
     where n.completed_at is not null and o.completed_at is null),
  -- Without those that are being deleted: that may take long, and nobody's end of a job is to wait for it.
  wanted as materialized (
    select w.id, w.user_id, w.events from public.webhook_endpoints w
     where w.user_id in (select e.user_id from ended e) and w.disabled_at is null for key share skip locked),
  addressed as (
    select e.*, w.id as endpoint_id, null::text as url from ended e join wanted w on w.user_id = e.user_id and e.event = any (w.events)
    union all
    select e.*, null, e.webhook_url from ended e where e.webhook_url is not null),
  told as (
    insert into public.webhook_deliveries (user_id, endpoint_id, job_id, url, event, payload, queue_job_id)
    select user_id, endpoint_id, id, url, event, payload, nextval('procrastinate.procrastinate_jobs_id_seq') from addressed
    returning id, queue_job_id)
  insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, args)
  select queue_job_id, 'webhooks', 'deliver_webhook', jsonb_build_object('delivery_id', id) from told;
  return null;
end $$;
create trigger tell_of_ended_jobs after update on public.processing_jobs
  referencing old table as old_rows new table as new_rows for each statement execute function pgscribe.tell_of_ended_jobs();

create function pgscribe.rfc3339(at timestamptz) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select to_char(at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$;
comment on function pgscribe.rfc3339 is 'A time as JSON has it, in UTC.';

-- One truth: a delivery's status is that of its queue job --------------------------------------------------------------

create function pgscribe.mirror_delivery_status() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  delivery public.webhook_deliveries;
begin
  perform set_config('pgscribe.mirroring', 'on', true);
  update public.webhook_deliveries d set
      status = case new.status when 'todo' then 'queued' when 'doing' then 'sending' when 'succeeded' then 'delivered' else 'failed' end,
      due_at = case when new.status = 'todo' and new.scheduled_at > now() then new.scheduled_at end,
      completed_at = case when new.status not in ('todo', 'doing') then now() end,
      error_code = case when new.status not in ('todo', 'doing', 'succeeded') then coalesce(d.error_code, 'internal_error') else d.error_code end
   where d.id = (new.args ->> 'delivery_id')::uuid and d.queue_job_id = new.id
  returning * into delivery;
  perform set_config('pgscribe.mirroring', '', true);
  -- Nobody has heard anything there for as long as this one was tried: days.
  if delivery.status = 'failed' and delivery.endpoint_id is not null and delivery.attempts > 0
      and delivery.created_at < now() - interval '1 day' and not exists (
        select from public.webhook_deliveries s
         where s.endpoint_id = delivery.endpoint_id and s.succeeded_at > delivery.created_at) then
    perform pgscribe.disable_webhook_endpoint(delivery.endpoint_id, 'failing');
  end if;
  return null;
end $$;
create trigger pgscribe_mirror_delivery_status after update on procrastinate.procrastinate_jobs
  for each row when (new.queue_name = 'webhooks' and new.status <> old.status)
  execute function pgscribe.mirror_delivery_status();

create function pgscribe.mirror_delivery_deletion() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform set_config('pgscribe.mirroring', 'on', true);
  update public.webhook_deliveries d set
      status = 'failed', completed_at = now(), due_at = null, queue_job_id = null,
      error_code = 'queue_job_deleted', error = 'The queue job was deleted before it was delivered.'
   where d.id = (old.args ->> 'delivery_id')::uuid and d.queue_job_id = old.id;
  perform set_config('pgscribe.mirroring', '', true);
  return null;
end $$;
create trigger pgscribe_mirror_delivery_deletion after delete on procrastinate.procrastinate_jobs
  for each row when (old.queue_name = 'webhooks' and old.status in ('todo', 'doing'))
  execute function pgscribe.mirror_delivery_deletion();

create function pgscribe.guard_webhook_delivery() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if new.status <> old.status and current_setting('pgscribe.mirroring', true) is distinct from 'on' then
    perform pgscribe.reject('status', 'follows the queue job', 'Call replay_webhook_delivery(id).');
  end if;
  new.updated_at := now();
  return new;
end $$;
create trigger guard_webhook_delivery before update on public.webhook_deliveries
  for each row execute function pgscribe.guard_webhook_delivery();

-- The queue jobs of deliveries that go with their endpoint or their owner. That of one that is being sent goes when it ends.
create function pgscribe.forget_deleted_deliveries() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from procrastinate.procrastinate_jobs q using old_rows o where q.id = o.queue_job_id and q.status <> 'doing';
  return null;
end $$;
create trigger forget_deleted_deliveries after delete on public.webhook_deliveries
  referencing old table as old_rows for each statement execute function pgscribe.forget_deleted_deliveries();

create function pgscribe.forget_ended_queue_job() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from procrastinate.procrastinate_jobs q
   where q.id = new.id and q.status <> 'doing'
     and not exists (select from public.webhook_deliveries d where d.id = (new.args ->> 'delivery_id')::uuid);
  return null;
end $$;
-- At the end of the transaction, as procrastinate notes an event of the job meanwhile.
create constraint trigger pgscribe_forget_ended_queue_job after update on procrastinate.procrastinate_jobs
  deferrable initially deferred for each row
  when (new.queue_name = 'webhooks' and old.status = 'doing' and new.status <> 'doing')
  execute function pgscribe.forget_ended_queue_job();

create function pgscribe.disable_webhook_endpoint(endpoint uuid, reason text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  perform set_config('pgscribe.disabling', reason, true);
  -- Whoever deletes it waits for deliveries that this transaction has locked.
  update public.webhook_endpoints e set disabled_at = now() where e.id = (
    select x.id from public.webhook_endpoints x where x.id = endpoint and x.disabled_at is null for no key update skip locked);
  perform set_config('pgscribe.disabling', '', true);
end $$;
comment on function pgscribe.disable_webhook_endpoint is 'Sends nothing more to an endpoint until its owner enables it. One that somebody else has locked stays as it is.';

-- What a worker does with a delivery ------------------------------------------------------------------------------------

insert into pgscribe.queue_settings (queue_name, max_running_per_owner) values ('webhooks', 5);

create table pgscribe.delivery_turn (
  only_row boolean primary key default true check (only_row),
  last_owner uuid not null default '00000000-0000-0000-0000-000000000000'
);
insert into pgscribe.delivery_turn default values;
comment on table pgscribe.delivery_turn is
  'One row: the owner whose delivery was claimed last. Who claims holds it, so that two do not both count what is under way, nor plan the same ones.';
revoke all on pgscribe.delivery_turn from public, anon, authenticated, service_role;

create function pgscribe.claim_deliveries(worker bigint, wanted integer, out jobs json[], out next_due timestamptz, out more boolean)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  max_per_owner integer;
  paused boolean;
  here uuid;
  start uuid;
  around boolean := false;
  looked integer := 0;
  room integer;
  owners uuid[] := '{}';
  rooms integer[] := '{}';
  planned uuid[];
begin
  jobs := '{}';
  more := false;
  select s.max_running_per_owner, s.paused_at is not null into max_per_owner, paused
    from pgscribe.queue_settings s where s.queue_name = 'webhooks';
  if paused or wanted = 0 then
    return;
  end if;
  next_due := (select min(d.due_at) from public.webhook_deliveries d where d.status = 'queued' and d.due_at is not null);
  if next_due <= now() then
    with due as (
      update public.webhook_deliveries d set due_at = null
       where d.id in (select f.id from public.webhook_deliveries f
                       where f.status = 'queued' and f.due_at <= now() order by f.due_at limit 1000 for update skip locked)
      returning 1)
    select count(*) = 1000 into more from due;
    next_due := (select min(d.due_at) from public.webhook_deliveries d where d.status = 'queued' and d.due_at is not null);
    if next_due <= now() then  -- somebody else has it locked
      next_due := now() + interval '1 second';
    end if;
  end if;
  if not exists (select from public.webhook_deliveries d where d.status = 'queued' and d.due_at is null) then
    return;
  end if;
  -- On from where the last claim ended, owner by owner, so that everybody's turn comes however many another one has.
  select t.last_owner into start from pgscribe.delivery_turn t for update;
  here := start;
  while cardinality(owners) < wanted and looked < 200 loop
    here := (select d.user_id from public.webhook_deliveries d
              where d.status = 'queued' and d.due_at is null and d.user_id > here order by d.user_id limit 1);
    if here is null and not around then
      around := true;
      here := '00000000-0000-0000-0000-000000000000';
      continue;
    end if;
    exit when here is null or (around and here > start);
    looked := looked + 1;
    room := max_per_owner - (select count(*) from public.webhook_deliveries d where d.status = 'sending' and d.user_id = here);
    if room > 0 then
      owners := owners || here;
      rooms := rooms || room;
    end if;
  end loop;
  if looked = 200 then  -- there may be others, whose turn it is next
    owners := owners || here;
    rooms := rooms || 0;
    next_due := least(next_due, now() + interval '1 second');
  end if;
  if owners = '{}' then
    return;
  end if;
  update pgscribe.delivery_turn set last_owner = owners[cardinality(owners)];
  planned := array(
    select l.id from (
      select r.id, row_number() over (partition by o.owner order by r.created_at, r.id) as place, o.number
        from unnest(owners, rooms) with ordinality o (owner, room, number)
       cross join lateral (
         select d.id, d.created_at from public.webhook_deliveries d
          where d.user_id = o.owner and d.status = 'queued' and d.due_at is null
          order by d.created_at, d.id limit least(o.room, wanted)) r) l
     order by l.place, l.number limit wanted);
  with locked as materialized (
    select q.id from public.webhook_deliveries d join procrastinate.procrastinate_jobs q on q.id = d.queue_job_id
     where d.id = any (planned) and d.status || '' = 'queued' and q.status::text = 'todo'
       for update of d, q skip locked),
  moved as (
    update procrastinate.procrastinate_jobs q set status = 'doing', worker_id = worker from locked l where q.id = l.id
    returning q.*)
  select coalesce(array_agg(json_build_object('queue_job_id', m.id, 'task_name', m.task_name, 'queue_name', m.queue_name,
           'priority', m.priority, 'args', m.args, 'attempts', m.attempts, 'lock', m.lock)), '{}')
    into jobs from moved m;
  if cardinality(jobs) < cardinality(planned) then  -- somebody else has the others locked, and tells nobody when they are free
    next_due := least(next_due, now() + interval '1 second');
  end if;
end $$;
comment on function pgscribe.claim_deliveries is
  'Claims up to so many deliveries for a worker: one of each owner''s in turn, never more of one owner''s at a time than pgscribe.queue_settings allows; none while the queue is paused.';

create function pgscribe.busy_deliveries(queue_jobs bigint[]) returns bigint[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  meant bigint[];
  locked bigint[];
begin
  with m as materialized (
    select q.id, d.id as delivery
      from procrastinate.procrastinate_jobs q join public.webhook_deliveries d on d.id = (q.args ->> 'delivery_id')::uuid
     where q.id = any (queue_jobs) and q.queue_name = 'webhooks'),
  l as materialized (
    select q.id from m join public.webhook_deliveries d on d.id = m.delivery join procrastinate.procrastinate_jobs q on q.id = m.id
       for update of d, q skip locked)
  select array(select m.id from m), array(select l.id from l) into meant, locked;
  return array(select unnest(meant) except select unnest(locked));
end $$;
comment on function pgscribe.busy_deliveries is
  'Locks deliveries by their queue jobs, and returns which of those it can''t: somebody else has them locked. Ending these is for later.';

create function pgscribe.begin_delivery(delivery uuid) returns json
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
  if e.disabled_at is not null then
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
comment on function pgscribe.begin_delivery is
  'What a request of a delivery needs: url, payload, and secrets to sign it with. Null: it is deleted, or has been taken. disabled: its endpoint is.';

create function pgscribe.record_delivery(
  delivery uuid, seconds double precision, response_status integer, response_excerpt text, error_code text, error text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  d public.webhook_deliveries;
begin
  update public.webhook_deliveries x set
      attempts = x.attempts + 1, response_status = record_delivery.response_status, error_code = record_delivery.error_code,
      error = record_delivery.error, succeeded_at = case when record_delivery.error_code is null then now() else x.succeeded_at end
   where x.id = delivery returning * into d;
  if d.id is null then
    return;
  end if;
  insert into public.webhook_attempts (delivery_id, attempt, started_at, seconds, response_status, response_excerpt, error_code, error)
  values (d.id, d.attempts, now() - make_interval(secs => record_delivery.seconds), record_delivery.seconds,
          record_delivery.response_status, record_delivery.response_excerpt, record_delivery.error_code, record_delivery.error);
  if record_delivery.error_code = 'webhook_gone' and d.endpoint_id is not null then
    perform pgscribe.disable_webhook_endpoint(d.endpoint_id, 'gone');
  end if;
end $$;
comment on function pgscribe.record_delivery is 'Notes what came of a request: no error_code, it was taken; webhook_gone, its endpoint is disabled.';

create function pgscribe.refuse_delivery(delivery uuid, error_code text, error text) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  update public.webhook_deliveries d set error_code = refuse_delivery.error_code, error = refuse_delivery.error where d.id = delivery
$$;
comment on function pgscribe.refuse_delivery is 'Notes why no request was made.';

-- Once more ---------------------------------------------------------------------------------------------------------------

-- Workers tell each other by these numbers what they have looked for, so each kind has its own.
create function pgscribe.wake_couriers() returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select pg_notify('procrastinate_queue_v1#webhooks',
    jsonb_build_object('type', 'job_inserted', 'job_id', -2 * pg_current_xact_id()::text::bigint - 1)::text)
$$;
comment on function pgscribe.wake_couriers is 'Tells the workers that there are light jobs to start; procrastinate does so for new ones only.';

create or replace function pgscribe.wake_workers() returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  select pg_notify('procrastinate_queue_v1#transcription',
    jsonb_build_object('type', 'job_inserted', 'job_id', -2 * pg_current_xact_id()::text::bigint)::text);
  select pgscribe.wake_couriers();
$$;
comment on function pgscribe.wake_workers is 'Tells the workers that there are jobs to start, light ones too; procrastinate does so for new ones only.';

create function pgscribe.replay_deliveries(ids uuid[]) returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  d public.webhook_deliveries;
  replayed integer := 0;
begin
  for d in
    select * from public.webhook_deliveries x
     where x.id = any (ids) and x.status in ('delivered', 'failed')
       and not exists (select from public.webhook_endpoints e where e.id = x.endpoint_id and e.disabled_at is not null)
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
comment on function pgscribe.replay_deliveries is
  'Sends these again, with all their attempts, unless they still wait or their endpoint is disabled; returns how many.';

create function public.replay_webhook_delivery(id uuid) returns public.webhook_deliveries
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  found_one public.webhook_deliveries;
begin
  select * into found_one from public.webhook_deliveries d
   where d.id = replay_webhook_delivery.id and (d.user_id = auth.uid() or not pgscribe.is_one_user() or pgscribe.is_operator());
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
comment on function public.replay_webhook_delivery is
  'Sends a delivery again, with the same id, whether it was delivered or has failed; one that still waits is left as it is. Returns the row, or null if there is none that you may see.';

create function public.replay_webhook_deliveries(
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
     order by d.created_at, d.id limit 1000));
end $$;
comment on function public.replay_webhook_deliveries is
  'Sends your deliveries of that time that have failed, or were delivered, again: the oldest 1000 of them. Returns how many.';

create function public.send_test_webhook(endpoint_id uuid) returns public.webhook_deliveries
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
  e public.webhook_endpoints;
  d public.webhook_deliveries;
begin
  select * into e from public.webhook_endpoints x
   where x.id = send_test_webhook.endpoint_id and (x.user_id = auth.uid() or not pgscribe.is_one_user());
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
comment on function public.send_test_webhook is 'Sends a webhook.test to an endpoint. Returns the delivery, or null if there is no such endpoint that you may see.';

revoke execute on function
  public.replay_webhook_delivery, public.replay_webhook_deliveries, public.send_test_webhook from public, anon;
grant execute on function
  public.replay_webhook_delivery, public.replay_webhook_deliveries, public.send_test_webhook to authenticated, service_role;

-- Retention -----------------------------------------------------------------------------------------------------------------

create function pgscribe.prune_deliveries(older_than interval, batch integer) returns integer
language sql volatile set search_path = pg_catalog, pg_temp as $$
  with old as (
    select d.id from public.webhook_deliveries d where d.completed_at < now() - older_than
     order by d.completed_at limit batch for update skip locked),
  gone as (delete from public.webhook_deliveries d using old where d.id = old.id returning 1)
  select count(*)::integer from gone
$$;
comment on function pgscribe.prune_deliveries is 'Deletes deliveries that ended so long ago, with their queue jobs: up to batch of them. Returns how many.';

revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
grant execute on function pgscribe.search_document(uuid, jsonb) to authenticated, service_role;
