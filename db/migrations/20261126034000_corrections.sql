-- What the owner of a transcript has corrected: beside the result, which stays as it was transcribed.
--
-- A segment is named by its place in result -> 'segments'. That is stable: a result is written in the transaction that
-- completes the job, only failed and cancelled jobs are tried again (pgscribe.guard_processing_job), and no API role
-- may update the column. `postgres`, who could, has to delete the job's corrections then.

create table public.transcript_corrections (
  job_id uuid not null references public.processing_jobs (id) on delete cascade,
  segment integer not null,
  text text,
  speaker text,
  updated_at timestamptz not null default now(),
  primary key (job_id, segment)
);
comment on table public.transcript_corrections is
  'What owners have corrected in the transcripts of their completed jobs. The results themselves never change. A row that says nothing any more is deleted.';
comment on column public.transcript_corrections.job_id is 'The job, which has completed.';
comment on column public.transcript_corrections.segment is 'The segment''s place in the result''s segments, from 0.';
comment on column public.transcript_corrections.text is
  'What was said, at most 10,000 characters, and 1,000,000 of all segments; null: as transcribed; empty: the segment is left out.';
comment on column public.transcript_corrections.speaker is 'Who said it, 1 to 100 characters; null: not known.';
comment on column public.transcript_corrections.updated_at is 'When the row last changed.';

create function pgscribe.reject_correction(segment integer, field text, problem text, hint text) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  raise check_violation using
    message = format('%s: %s', field, problem), hint = hint, detail = json_build_object('segment', segment)::text,
    schema = 'public', table = 'transcript_corrections', column = field;
end $$;
comment on function pgscribe.reject_correction is
  'Refuses a correction, naming the field, what is wrong with it and the way out; the detail says of which segment.';

create function pgscribe.check_correction() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  new.speaker := regexp_replace(new.speaker, '^[[:space:]]+|[[:space:]]+$', '', 'g');
  if length(new.text) > 10000 then
    perform pgscribe.reject_correction(new.segment, 'text', format('must have at most 10000 characters, not %s', length(new.text)),
      'Shorten it; a text that is longer belongs to several segments.');
  -- Not [:cntrl:]: what that is depends on the database's locale.
  elsif new.text ~ '[\u0001-\u0008\u000b-\u001f\u007f-\u009f]' then
    perform pgscribe.reject_correction(new.segment, 'text', 'must not hold control characters, but for newlines and tabs', 'Leave them out.');
  elsif length(new.speaker) not between 1 and 100 then
    perform pgscribe.reject_correction(new.segment, 'speaker', format('must have 1 to 100 characters, not %s', length(new.speaker)),
      'Send null if nobody is to be named.');
  elsif new.speaker ~ '[\u0001-\u001f\u007f-\u009f\u2028\u2029]' then
    perform pgscribe.reject_correction(new.segment, 'speaker', 'must not hold control characters or line breaks', 'Leave them out.');
  end if;
  new.updated_at := now();
  return new;
end $$;
create trigger check_correction before insert or update on public.transcript_corrections
  for each row execute function pgscribe.check_correction();

-- For each statement: a result may have megabytes, and is read once, however many of its segments are corrected.
create function pgscribe.check_corrected_segments() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  wrong record;
  too_long record;
begin
  with jobs as materialized (
    select p.id, p.status, case jsonb_typeof(r.segments) when 'array' then jsonb_array_length(r.segments) else 0 end as segments
      from public.processing_jobs p
     cross join lateral (select p.result -> 'segments' as segments offset 0) r
     where p.id in (select n.job_id from changed n))
  select n.segment, j.status, j.segments into wrong
    from changed n join jobs j on j.id = n.job_id
   where j.status <> 'completed' or n.segment not between 0 and j.segments - 1
   order by n.segment limit 1;
  if wrong.status <> 'completed' then
    perform pgscribe.reject_correction(wrong.segment, 'job_id', format('the job is %s', wrong.status),
      'Only transcripts of completed jobs can be corrected.');
  elsif found then
    perform pgscribe.reject_correction(wrong.segment, 'segment',
      format('must be from 0 to %s, not %s: the transcript has %s segments', wrong.segments - 1, wrong.segment, wrong.segments),
      'Count the segments of the job''s result from 0.');
  end if;
  -- Whoever reads the transcript has all of it put together.
  select sum(length(c.text)) as characters,
         (select max(n.segment) from changed n where n.job_id = c.job_id and n.text is not null) as segment into too_long
    from public.transcript_corrections c
   where c.job_id in (select n.job_id from changed n where n.text is not null)
   group by c.job_id having sum(length(c.text)) > 1000000 limit 1;
  if found then
    perform pgscribe.reject_correction(too_long.segment, 'text',
      format('the corrected texts of a transcript must have at most 1000000 characters, not %s', too_long.characters), 'Shorten some.');
  end if;
  delete from public.transcript_corrections c
   using changed n
   where n.text is null and n.speaker is null and c.job_id = n.job_id and c.segment = n.segment
     and c.text is null and c.speaker is null;
  return null;
end $$;
create trigger check_inserted_segments after insert on public.transcript_corrections
  referencing new table as changed for each statement execute function pgscribe.check_corrected_segments();
create trigger check_updated_segments after update on public.transcript_corrections
  referencing new table as changed for each statement execute function pgscribe.check_corrected_segments();

alter table public.transcript_corrections enable row level security;
create policy "Owners correct the transcripts of their jobs" on public.transcript_corrections
  for all to authenticated
  using (exists (select from public.processing_jobs p where p.id = transcript_corrections.job_id and p.user_id = (select auth.uid())));

-- An upsert of PostgREST sets the key, too, so that may be updated: to another segment of one's own.
revoke all on public.transcript_corrections from public, anon, authenticated, service_role;
grant select, delete, insert (job_id, segment, text, speaker), update (job_id, segment, text, speaker)
  on public.transcript_corrections to authenticated, service_role;
revoke execute on function pgscribe.reject_correction, pgscribe.check_correction, pgscribe.check_corrected_segments
  from public, anon, authenticated, service_role;
