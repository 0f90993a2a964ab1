-- The ledger that the Supabase CLI keeps: `supabase db push` and `pgscribe migrate` honour each other.

-- create_ledger --
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (
  version text primary key, statements text[], name text)

-- ledger_exists --
select to_regclass('supabase_migrations.schema_migrations') is not null

-- applied_versions --
select version from supabase_migrations.schema_migrations order by version

-- lock --
select set_config('lock_timeout', %(milliseconds)s::text, true), pg_advisory_xact_lock(hashtextextended('pgscribe migrate', 0))

-- be_brief --
-- Whoever comes after somebody that waits for a table's lock waits, too: the whole queue would stand still behind a
-- migration that waits for one long transaction. Workers give a statement 4 s for its locks. The work itself may take as long as it
-- does: hosted Supabase would end a migration after two minutes, and the next attempt at the same point.
select set_config('lock_timeout', '1s', true), set_config('statement_timeout', '0', true)

-- holders --
-- Transactions that are older than this one waited, and hold locks that a migration may need.
select a.pid, coalesce(nullif(a.application_name, ''), a.usename, 'unknown') as who,
       extract(epoch from clock_timestamp() - a.xact_start)::int as seconds,
       string_agg(distinct l.relation::regclass::text, ', ') as tables
  from pg_locks l join pg_stat_activity a on a.pid = l.pid
  join pg_class c on c.oid = l.relation and c.relkind in ('r', 'p')
  join pg_namespace n on n.oid = c.relnamespace and n.nspname in ('public', 'pgscribe', 'procrastinate', 'auth', 'storage')
 where l.database = (select oid from pg_database where datname = current_database())
   and l.granted and l.locktype = 'relation' and l.pid <> pg_backend_pid()
   and a.xact_start < clock_timestamp() - interval '0.5 s'
 group by a.pid, a.application_name, a.usename, a.xact_start order by a.xact_start limit 5

-- is_applied --
select exists (select from supabase_migrations.schema_migrations where version = %(version)s)

-- record --
insert into supabase_migrations.schema_migrations (version, name, statements)
values (%(version)s, %(name)s, array[%(sql)s])
