-- What operators see of webhooks, and may send again. As with jobs, the functions ask first who the caller is.

drop index public.webhook_deliveries_failed_idx;
create index webhook_deliveries_open_idx on public.webhook_deliveries (status, created_at desc, id desc) where status <> 'delivered';

create function public.operator_deliveries(
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
     where d.status = with_status and d.status <> 'delivered'
       and (of_owner is null or d.user_id = of_owner)
       and (after_id is null or (d.created_at, d.id) < (after_created_at, after_id))
     order by d.created_at desc, d.id desc limit operator_deliveries."limit";
end $$;
comment on function public.operator_deliveries is
  'For operators: everybody''s deliveries that wait (queued), are under way (sending) or have failed, newest first. url has no more than scheme, host and port.';

create function public.operator_replay_deliveries(ids uuid[]) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.require_operator();
  return pgscribe.replay_deliveries(ids[1:1000]);
end $$;
comment on function public.operator_replay_deliveries is
  'For operators: sends deliveries again, up to 1000 of them; those that wait, or whose endpoint is disabled, stay as they are. Returns how many.';

create function pgscribe.overview_of_webhooks(hours integer) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'queued', q.queued, 'waiting', q.waiting, 'sending', q.sending,
    'oldest_queued_seconds', q.oldest, 'delivered', e.delivered, 'failed', e.failed,
    'seconds', jsonb_build_object('p50', s.p50, 'p95', s.p95),
    'disabled_endpoints', (select count(*) from public.webhook_endpoints w where w.disabled_reason in ('gone', 'failing')))
    from (
      select count(*) filter (where d.status = 'queued' and d.due_at is null) as queued,
             count(*) filter (where d.status = 'queued' and d.due_at is not null) as waiting,
             count(*) filter (where d.status = 'sending') as sending,
             extract(epoch from now() - min(d.created_at) filter (where d.status = 'queued' and d.due_at is null)) as oldest
        from public.webhook_deliveries d where d.status in ('queued', 'sending')) q
   cross join (
      select count(*) filter (where d.status = 'delivered') as delivered, count(*) filter (where d.status = 'failed') as failed
        from public.webhook_deliveries d where d.completed_at > now() - make_interval(hours => hours)) e
   cross join (
      select percentile_cont(0.5) within group (order by x.seconds) as p50, percentile_cont(0.95) within group (order by x.seconds) as p95
        from (select extract(epoch from d.succeeded_at - d.created_at) as seconds from public.webhook_deliveries d
               where d.completed_at > now() - make_interval(hours => hours) and d.status = 'delivered'
               order by d.completed_at desc limit 10000) x) s
$$;
comment on function pgscribe.overview_of_webhooks is
  'Deliveries now, and those that ended in the last so many hours; seconds: from the end of the job to a receiver''s answer, of the newest 10000.';

create or replace function public.operator_overview(hours integer default 24, stall_timeout double precision default 30) returns jsonb
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
    || jsonb_build_object('workers', pgscribe.overview_of_workers(stall_timeout), 'costs', pgscribe.daily_costs(),
         'webhooks', pgscribe.overview_of_webhooks(hours));
end $$;

revoke execute on function public.operator_deliveries, public.operator_replay_deliveries from public, anon, authenticated, service_role;
grant execute on function public.operator_deliveries, public.operator_replay_deliveries to authenticated;
revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
grant execute on function pgscribe.search_document(uuid, jsonb) to authenticated, service_role;
