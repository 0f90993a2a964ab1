-- Who a transaction runs as.

-- act_as_user --
-- Exactly what PostgREST does: role and claims, both for this transaction only.
select set_config('role', 'authenticated', true),
       set_config('request.jwt.claims', %(claims)s, true),
       set_config('statement_timeout', '8s', true)

-- use_queue_schema --
-- procrastinate's queries name their tables without a schema.
set search_path = procrastinate, pg_temp
