-- What `pgscribe doctor` looks at. It changes nothing.

-- server --
select current_setting('server_version') as version, current_setting('server_version_num')::int as number,
       current_user as role, current_database() as name, r.rolsuper as superuser, r.rolbypassrls as bypasses,
       current_setting('statement_timeout') as statement_timeout,
       extract(epoch from current_setting('statement_timeout')::interval)::float8 as statement_seconds,
       current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int as connections,
       (select count(*) from pg_stat_activity where backend_type = 'client backend') as used,
       (select count(*) from pg_stat_activity where application_name = 'pgscribe worker' and datname = current_database()) as workers,
       pg_is_in_recovery() as standby
  from pg_roles r where r.rolname = current_user

-- transactions --
select array(
  select format('process %%s (%%s, %%s)', a.pid, coalesce(nullif(a.application_name, ''), a.usename), a.state)
    from pg_stat_activity a
   where a.backend_type = 'client backend' and a.datname = current_database() and a.pid <> pg_backend_pid()
     and a.xact_start < now() - make_interval(secs => %(longest)s)
   order by a.xact_start limit 5) as long,
       (select extract(epoch from now() - min(a.xact_start))::float8 from pg_stat_activity a
         where a.backend_type = 'client backend' and a.datname = current_database() and a.pid <> pg_backend_pid()) as oldest

-- slots --
select s.slot_name as name, pg_size_pretty(kept.bytes) as size
  from pg_replication_slots s,
       lateral (select pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end,
                                       s.restart_lsn) as bytes) kept
 where not s.active and kept.bytes > %(most)s
 order by kept.bytes desc

-- missing_roles --
select array(select n from unnest(array['anon', 'authenticated', 'service_role']) n
              where not exists (select from pg_roles where rolname = n)) as missing

-- act_as --
select set_config('role', %(role)s, true)

-- owns_jobs --
select coalesce(pg_has_role(c.relowner, 'usage'), false) as owns from pg_class c where c.oid = to_regclass('public.processing_jobs')

-- ledger_exists --
select to_regclass('supabase_migrations.schema_migrations') is not null as there

-- ledger --
-- Other migrations of the project are in it, too: of those that we do not know, only what names pgscribe's schema counts.
-- `supabase db push` records a migration in its single statements, and each without the semicolon at its end.
select version, coalesce(name, '') as name, case when cardinality(statements) = 1 then md5(rtrim(statements[1], E'; \r\n')) end as checksum,
       version = any (%(known)s) as known
  from supabase_migrations.schema_migrations
 where version = any (%(known)s) or array_to_string(statements, ' ') like '%%pgscribe.%%'
 order by version

-- now --
select extract(epoch from clock_timestamp())::float8

-- backend --
select pg_backend_pid()

-- notify --
select pg_notify(%(channel)s, '')

-- queue --
with late as (
  select p.id, p.job_id, p.created_at, greatest(p.created_at, p.scheduled_at, p.due_at, p.retry_requested_at) as since
    from public.processing_jobs p
   where p.status = 'queued' and coalesce(p.due_at <= now(), true) and coalesce(p.scheduled_at <= now(), true)
   order by p.created_at limit 10001)
select (select count(*) from procrastinate.procrastinate_workers w
         where w.last_heartbeat > now() - make_interval(secs => %(stall_timeout)s)) as alive,
       (select extract(epoch from now() - max(w.last_heartbeat))::float8 from procrastinate.procrastinate_workers w) as last_seen,
       (select count(*) from late) as waiting,
       (select count(*) from late where late.job_id is null) as stranded,
       (select extract(epoch from now() - min(late.since))::float8 from late) as oldest,
       (select count(*) from procrastinate.procrastinate_jobs q
         where q.status = 'doing' and q.queue_name = 'transcription'
           and not exists (select from procrastinate.procrastinate_workers w where w.id = q.worker_id
                            and w.last_heartbeat > now() - 2 * make_interval(secs => %(stall_timeout)s))) as orphaned,
       (select count(*) from public.processing_jobs p where p.status = 'processing') as running,
       array(select s.queue_name || ' since ' || to_char(s.paused_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI "UTC"')
               from pgscribe.queue_settings s where s.paused_at is not null order by 1) as paused,
       (select count(*) from pgscribe.owner_limits l where l.paused_at is not null) as paused_owners

-- versions --
-- Connections of workers' and web servers' pools are named so: pgscribe tasks 0.1.0.
select array(
  select distinct split_part(a.application_name, ' ', 3) from pg_stat_activity a
   where a.datname = current_database() and a.application_name ~ '^pgscribe (tasks|web) \S+$' order by 1) as running

-- webhooks --
select (select count(*) from (
          select from public.webhook_deliveries d where d.status = 'queued' and coalesce(d.due_at <= now(), true) limit 10001) q) as ready,
       (select extract(epoch from now() - min(greatest(d.created_at, d.due_at)))::float8 from public.webhook_deliveries d
         where d.status = 'queued' and coalesce(d.due_at <= now(), true)) as oldest,
       (select count(*) from (
          select from public.webhook_deliveries d where d.status = 'queued' and d.due_at > now() limit 10001) q) as again,
       (select count(*) from public.webhook_endpoints e where e.disabled_reason in ('gone', 'failing')) as disabled,
       (select count(*) from public.webhook_endpoints e) as endpoints
