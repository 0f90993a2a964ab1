-- What there is to read, for benchmarks/isolation.py.

-- relations --
-- With the columns that a role may read, or all where it may read none.
select format('%%I.%%I', n.nspname, c.relname),
       coalesce(string_agg(quote_ident(a.attname), ', ' order by a.attnum)
                  filter (where has_column_privilege(%(role)s, c.oid, a.attnum, 'select')), '*')
  from pg_catalog.pg_class c
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
  join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
 where n.nspname in ('public', 'pgscribe', 'procrastinate') and c.relkind in ('r', 'v', 'm', 'p')
 group by 1, n.nspname order by 1

-- functions --
-- Those that a user may call, or that lie where users' do, with the arguments that they have to be given and those that they may be.
select format('%I.%I', n.nspname, p.proname), a.name, a.type, a.optional
  from pg_catalog.pg_proc p
  join pg_catalog.pg_namespace n on n.oid = p.pronamespace
  cross join lateral (
    select array_agg(p.proargnames[i] order by i), array_agg(format_type(t, null) order by i),
           array_agg(i > p.pronargs - p.pronargdefaults order by i)
      from unnest(p.proargtypes::oid[]) with ordinality x (t, i)) a (name, type, optional)
 where p.prokind = 'f' and p.prorettype <> 'trigger'::regtype
   and (n.nspname = 'public'
        or n.nspname in ('pgscribe', 'procrastinate') and has_function_privilege('authenticated', p.oid, 'execute'))
 order by p.oid::regprocedure::text
