-- What the migrations have made, as lines to compare: tables' row level security, policies, triggers, constraints, indexes,
-- functions, views, and what the API roles may do. Nothing in it depends on the version of Postgres.

-- names_in_full --
select set_config('search_path', 'pg_catalog', true)

-- objects --
with spaces as (
  select oid, nspname, nspacl, nspowner from pg_namespace where nspname in ('public', 'pgscribe', 'procrastinate')),
roles as (
  select 0::oid as oid, 'public' as name
  union all select oid, rolname from pg_roles where rolname in ('anon', 'authenticated', 'service_role')),
relations as (
  select c.oid, s.nspname || '.' || c.relname as name, s.nspname, c.relname, c.relkind, c.relrowsecurity, c.relacl, c.relowner, c.reloptions
    from pg_class c join spaces s on s.oid = c.relnamespace where c.relkind in ('r', 'p', 'v', 'm')),
functions as (
  select p.oid, format('%s.%s(%s)', s.nspname, p.proname, oidvectortypes(p.proargtypes)) as name, s.nspname, p.proname, p.prosrc, p.prosecdef, p.proconfig, p.proacl, p.proowner
    from pg_proc p join spaces s on s.oid = p.pronamespace),
grants as (
  select 'schema ' || s.nspname as object, a.grantee, a.privilege_type
    from spaces s cross join aclexplode(coalesce(s.nspacl, acldefault('n', s.nspowner))) a where s.nspname <> 'public'
  union all
  select r.name, a.grantee, a.privilege_type
    from relations r cross join aclexplode(coalesce(r.relacl, acldefault('r', r.relowner))) a
  union all
  select r.name || '.' || c.attname, a.grantee, a.privilege_type
    from relations r join pg_attribute c on c.attrelid = r.oid cross join aclexplode(c.attacl) a
   where not c.attisdropped
  union all
  select f.name, a.grantee, a.privilege_type
    from functions f cross join aclexplode(coalesce(f.proacl, acldefault('f', f.proowner))) a)
select 'rls' as kind, r.name as object, case when r.relrowsecurity then 'on' else 'off' end as detail
  from relations r where r.relkind in ('r', 'p')
union all
select 'view', r.name, case when o.option_value::boolean then 'of its invoker' else 'of its owner' end
  from relations r left join lateral pg_options_to_table(r.reloptions) o on o.option_name = 'security_invoker'
 where r.relkind = 'v' and r.nspname <> 'procrastinate'
union all
select 'policy', r.name,
       format('%s: %s for %s to %s by %s', p.policyname, lower(p.permissive), lower(p.cmd), array_to_string(p.roles, ', '),
              md5(concat(p.qual, ' with check ', p.with_check)))
  from relations r join pg_policies p on p.schemaname = r.nspname and p.tablename = r.relname
union all
select 'trigger', r.name, format('%s: %s', t.tgname, case t.tgenabled when 'D' then 'disabled' when 'R' then 'disabled' else 'enabled' end)
  from relations r join pg_trigger t on t.tgrelid = r.oid where not t.tgisinternal
union all
select 'index', r.name, format('%s: %s', c.relname, case when i.indisvalid then 'valid' else 'invalid' end)
  from relations r join pg_index i on i.indrelid = r.oid join pg_class c on c.oid = i.indexrelid
 where r.nspname <> 'procrastinate' or c.relname like 'pgscribe%'
union all
select 'constraint', r.name, format('%s: %s', c.conname, case when c.convalidated then 'valid' else 'not valid' end)
  from relations r join pg_constraint c on c.conrelid = r.oid
 where c.contype in ('c', 'f', 'x') and r.nspname <> 'procrastinate'
union all
select 'function', f.name,
       concat_ws(' ', md5(concat_ws(' ', f.prosrc, f.proconfig)), case when f.prosecdef then 'definer' else 'invoker' end)
  from functions f where f.nspname <> 'procrastinate' or f.proname like 'pgscribe%'
union all
select 'realtime', r.name, 'published'
  from relations r join pg_publication_tables p on p.schemaname = r.nspname and p.tablename = r.relname
 where p.pubname = 'supabase_realtime'
union all
select 'grant', g.object, format('%s: %s', r.name, lower(g.privilege_type))
  from grants g join roles r on r.oid = g.grantee where g.privilege_type <> 'MAINTAIN'
 order by 1, 2, 3
