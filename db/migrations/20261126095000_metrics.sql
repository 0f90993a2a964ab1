-- What `GET /metrics` tells of the whole database: only what waits, what runs and what ended in the last ten minutes is
-- read. docs/metrics.md says what the figures mean.

create function pgscribe.metrics_of_jobs() returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp
  set enable_seqscan = off set plan_cache_mode = force_custom_plan set jit = off as $$
begin
  return (
    with live as materialized (
      select p.user_id, case when p.due_at > now() then 'scheduled' else 'queued' end as state, count(*) as jobs,
             min(case when p.due_at > now() then p.created_at
                   -- One that was tried before has changed when it was given back or fell due.
                   else greatest(p.created_at, p.scheduled_at, p.retry_requested_at, case when p.attempt > 0 then p.updated_at end)
                 end) as since
        from public.processing_jobs p where p.status = 'queued' group by 1, 2
      union all
      select p.user_id, 'processing', count(*), min(p.started_at)
        from public.processing_jobs p where p.status = 'processing' group by 1),
    classified as (
      select l.state, l.jobs, l.since,
             case when o.paused_at is not null then 'paused'
                  when (o.weight, o.max_running, o.max_queued, o.max_audio_seconds_per_month, o.max_file_bytes, o.max_duration) is null
                    then 'default' else 'own' end as class
        from live l left join pgscribe.owner_limits o on o.owner_id = l.user_id),
    ended as materialized (
      select p.status, p.error_code, count(*) as jobs from public.processing_jobs p
       where p.completed_at >= now() - interval '10 minutes' group by 1, 2)
    select jsonb_build_object(
      'paused', (select s.paused_at is not null from pgscribe.queue_settings s where s.queue_name = 'transcription'),
      'jobs', (
        select jsonb_agg(jsonb_build_object('state', s.state, 'owners', k.class, 'jobs', coalesce(c.jobs, 0),
                 'oldest', greatest(extract(epoch from now() - c.since), 0)))
          from unnest(array['queued', 'scheduled', 'processing']) s (state)
         cross join unnest(array['default', 'own', 'paused']) k (class)
          left join (select c.state, c.class, sum(c.jobs) as jobs, min(c.since) as since from classified c group by 1, 2) c
            on c.state = s.state and c.class = k.class),
      'ended', (
        select jsonb_object_agg(s.status, coalesce((select sum(e.jobs) from ended e where e.status = s.status), 0))
          from unnest(array['completed', 'failed', 'cancelled']) s (status)),
      'failures', (
        select coalesce(jsonb_object_agg(f.error_code, f.jobs), '{}')
          from (select e.error_code, sum(e.jobs) as jobs from ended e where e.status = 'failed'
                 group by 1 order by 2 desc, 1 limit 50) f)));
end $$;
comment on function pgscribe.metrics_of_jobs is
  'Jobs by state and class of their owners (default: no limits of their own, own, paused), how old the oldest are in seconds, and those that ended in the last ten minutes, by status and, if they failed, by error.';

create function pgscribe.metrics_of_light_jobs() returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp
  set enable_seqscan = off set plan_cache_mode = force_custom_plan set jit = off as $$
begin
  return (
    with deliveries as materialized (
      select case when d.status = 'queued' and d.due_at is not null then 'waiting' else d.status end as state,
             count(*) as count,
             min(case when d.status = 'queued' and d.due_at is null then d.updated_at else d.created_at end) as since
        from public.webhook_deliveries d where d.status in ('queued', 'sending') group by 1),
    maintenance as (
      select 'queued' as state, count(*) as count from procrastinate.procrastinate_jobs q
       where q.status in ('todo', 'aborting') and q.queue_name not in ('transcription', 'webhooks')
         and coalesce(q.scheduled_at, '-infinity') <= now()
      union all
      select 'processing', count(*) from procrastinate.procrastinate_jobs q
       where q.worker_id is not null and q.status = 'doing' and q.queue_name || '' not in ('transcription', 'webhooks'))
    select jsonb_build_object(
      'deliveries', (
        select jsonb_agg(jsonb_build_object('state', s.state, 'count', coalesce(d.count, 0),
                 'oldest', greatest(extract(epoch from now() - d.since), 0)))
          from unnest(array['queued', 'waiting', 'sending']) s (state) left join deliveries d on d.state = s.state),
      'delivered', (
        select jsonb_build_object('delivered', count(*) filter (where d.status = 'delivered'),
                 'failed', count(*) filter (where d.status = 'failed'))
          from public.webhook_deliveries d where d.completed_at >= now() - interval '10 minutes'),
      'disabled_endpoints', (select count(*) from public.webhook_endpoints e where e.disabled_reason in ('gone', 'failing')),
      'maintenance', (select jsonb_object_agg(m.state, m.count) from maintenance m)));
end $$;
comment on function pgscribe.metrics_of_light_jobs is
  'Webhooks that are ready (queued), wait for another attempt (waiting) or are being sent, how old the oldest are in seconds, those that ended in the last ten minutes, endpoints that pgscribe has disabled, and maintenance by state.';

create function pgscribe.metrics_of_workers(stall_timeout double precision) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object('alive', count(*) filter (where w.alive), 'stalled', count(*) filter (where not w.alive))
    from (select last_heartbeat > now() - make_interval(secs => stall_timeout) as alive from procrastinate.procrastinate_workers) w
$$;
comment on function pgscribe.metrics_of_workers is
  'How many workers have been heard of within so many seconds, and how many that have not signed off have not.';

create function public.operator_metrics(stall_timeout double precision default 30) returns jsonb
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.require_operator();
  return pgscribe.metrics_of_jobs() || pgscribe.metrics_of_light_jobs()
    || jsonb_build_object('workers', pgscribe.metrics_of_workers(stall_timeout));
end $$;
comment on function public.operator_metrics is
  'For operators: figures for monitoring, without users'' names and ids: jobs, webhooks and workers now, and what ended in the last ten minutes. GET /metrics tells them to Prometheus.';
revoke execute on function public.operator_metrics from public, anon, authenticated, service_role;
grant execute on function public.operator_metrics to authenticated;

-- Asked for once an attempt has begun: a claim does no more for it.
create function pgscribe.waited_seconds(job uuid) returns double precision
language sql stable set search_path = pg_catalog, pg_temp as $$
  select greatest(extract(epoch from p.started_at - greatest(
           p.created_at, p.scheduled_at, p.retry_requested_at, q.scheduled_at, a.ended_at)), 0)
    from public.processing_jobs p
    left join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
    left join public.processing_job_attempts a on a.job_id = p.id and a.attempt = p.attempt - 1
   where p.id = job and p.status || '' = 'processing'
$$;
comment on function pgscribe.waited_seconds is
  'How long a job that runs could have started before it did: since it was submitted, due, retried or given back.';

revoke execute on function
  pgscribe.metrics_of_jobs, pgscribe.metrics_of_light_jobs, pgscribe.metrics_of_workers, pgscribe.waited_seconds
  from public, anon, authenticated, service_role;
