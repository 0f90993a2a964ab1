-- Supabase Realtime tells signed-in users of changes to the tables in this publication, as far as row level security
-- lets each of them see the row. The publication is Supabase's: nothing is made or taken over where it is not as on a
-- new project. docs/decisions/0009-dashboard-and-realtime.md says why there is no list of columns here.
do $$
begin
  if not exists (select from pg_publication where pubname = 'supabase_realtime') then
    raise notice 'There is no publication supabase_realtime. Once there is: alter publication supabase_realtime add table public.processing_jobs';
  elsif not exists (
      select from pg_publication_tables t
       where t.pubname = 'supabase_realtime' and t.schemaname = 'public' and t.tablename = 'processing_jobs') then
    alter publication supabase_realtime add table public.processing_jobs;
  end if;
exception
  when insufficient_privilege then
    raise warning 'The publication supabase_realtime is not %''s. Its owner has to: alter publication supabase_realtime add table public.processing_jobs', current_user;
end $$;
