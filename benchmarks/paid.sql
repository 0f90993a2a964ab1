-- What benchmarks/paid.py asks pgscribe's database for.

-- note --
-- Keeps every id of a call that was ever there; the rows themselves keep those that are waited for.
create table public.noted (call_id text primary key, job_id uuid not null, index integer not null);
create function public.note() returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  insert into public.noted values (new.call_id, new.job_id, coalesce((to_jsonb(new) ->> 'index')::integer, -1))
  on conflict do nothing;
  return null;
end $$;
create trigger note after insert or update on public.processing_job_chunks for each row
  when (new.call_id is not null) execute function public.note();
create trigger note after insert or update on pgscribe.preparations for each row
  when (new.call_id is not null) execute function public.note()

-- insert --
insert into public.processing_jobs (user_id, file_path, max_attempts)
select %(owner)s, %(path)s, 20 from generate_series(1, %(jobs)s::integer)

-- workers --
select count(*) from procrastinate.procrastinate_workers

-- unfinished --
select count(*) from public.processing_jobs where completed_at is null

-- completed --
select count(*) from public.processing_jobs where status = 'completed' and result ->> 'text' = %(text)s

-- noted --
select call_id, job_id, index, extract(epoch from pg_xact_commit_timestamp(xmin))::float8 from public.noted

-- plain_workers --
select count(*) from procrastinate_workers

-- plain_unfinished --
select count(*) from procrastinate_jobs where queue_name = 'transcription' and status in ('todo', 'doing')

-- plain_completed --
select count(*) from procrastinate_jobs where queue_name = 'transcription' and status = 'succeeded'
