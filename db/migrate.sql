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
select set_config('lock_timeout', '10s', true), pg_advisory_xact_lock(hashtextextended('pgscribe migrate', 0))

-- is_applied --
select exists (select from supabase_migrations.schema_migrations where version = %(version)s)

-- record --
insert into supabase_migrations.schema_migrations (version, name, statements)
values (%(version)s, %(name)s, array[%(sql)s])
