-- What storage.py asks and does besides what pgscribe's worker does.

-- insert --
insert into public.processing_jobs (user_id, file_path)
select owner, owner || '/a.mp3' from unnest(%(owners)s::uuid[]) owner cross join generate_series(1, %(each)s)

-- sizes --
select c.oid::regclass::text, pg_total_relation_size(c.oid) from pg_class c
 where c.relkind = 'r'
   and c.relnamespace in ('public'::regnamespace, 'pgscribe'::regnamespace, 'procrastinate'::regnamespace)

-- written --
select pg_current_wal_insert_lsn() - '0/0'::pg_lsn

-- rows --
select coalesce(sum(n_tup_upd), 0)::float8, coalesce(sum(n_tup_hot_upd), 0)::float8,
       coalesce(sum(n_tup_del), 0)::float8, coalesce(sum(n_dead_tup), 0)::float8,
       coalesce(sum(autovacuum_count), 0)::float8
  from pg_stat_user_tables

-- others --
select count(*) from pg_stat_activity
 where datname = current_database() and pid <> pg_backend_pid() and backend_type = 'client backend'

-- snapshot --
select count(*) from public.processing_jobs
