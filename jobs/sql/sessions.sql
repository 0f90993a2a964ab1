-- Who a transaction runs as.

-- act_as_user --
-- Exactly what PostgREST does: role and claims, both for this transaction only.
select set_config('role', 'authenticated', true),
       set_config('request.jwt.claims', %(claims)s, true),
       set_config('statement_timeout', '8s', true)

-- missing_migrations --
select known.version from unnest(%(known)s::text[]) known (version)
 where not exists (select from supabase_migrations.schema_migrations m where m.version = known.version)
 limit 1

-- use_queue_schema --
-- procrastinate's queries name their tables without a schema.
set search_path = procrastinate, pg_temp
