-- Runs after each of procrastinate's migrations, in its transaction. Its functions find each other
-- and their tables by search_path; fixed here, they work from any session and any trigger.
do $$
declare
  signature regprocedure;
begin
  for signature in
    select oid from pg_proc where pronamespace = 'procrastinate'::regnamespace and proconfig is null
  loop
    execute format('alter function %s set search_path = procrastinate, pg_temp', signature);
  end loop;
end $$;
revoke all on schema procrastinate from public, anon, authenticated, service_role;
revoke execute on all functions in schema procrastinate from public, anon, authenticated, service_role;
reset search_path;
