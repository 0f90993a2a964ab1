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

-- Search looks into what was transcribed and shows what was corrected -----------------------------------------------

drop function pgscribe.search_hits(jsonb, tsquery);
create function pgscribe.search_hits(result jsonb, words tsquery, corrected jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(
    (select jsonb_agg(jsonb_build_object('start', h.segment -> 'start', 'end', h.segment -> 'end',
              'text', ts_headline('simple', h.shown, words, E'HighlightAll=true, StartSel=\x02, StopSel=\x03')) order by h.place)
       from (select s.segment, s.place, t.shown
               from jsonb_array_elements(case jsonb_typeof(result -> 'segments') when 'array' then result -> 'segments' else '[]' end)
                    with ordinality s (segment, place)
              cross join lateral (
                select translate(left(s.segment ->> 'text', 2000), E'\x02\x03', '') as plain,
                       translate(left(coalesce(corrected ->> (s.place - 1)::text, s.segment ->> 'text'), 2000), E'\x02\x03', '') as shown) t
              where to_tsvector('simple', t.plain) @@ words and t.shown ~ '[^[:space:]]'
              order by s.place limit 3) h),
    case when corrected is null then
      jsonb_build_array(jsonb_build_object('start', null, 'end', null, 'text',
        ts_headline('simple', translate(left(result ->> 'text', 20000), E'\x02\x03', ''), words,
          E'MaxFragments=1, MaxWords=30, MinWords=15, StartSel=\x02, StopSel=\x03')))
      else '[]' end)
$$;
comment on function pgscribe.search_hits is
  'Where words are in a transcript: up to three of its segments, as corrected (texts by segment, null for none), without those that are left out. Each hit stands between the control characters 2 and 3, which are nowhere else in the text.';

create or replace function public.search_transcripts(
  q text, "limit" integer default 20, after_created_at timestamptz default null, after_id uuid default null)
returns table (id uuid, created_at timestamptz, file_path text, language text, audio_seconds double precision, hits jsonb)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off set work_mem = '64MB' set plan_cache_mode = force_custom_plan as $$
declare
  owner uuid := auth.uid();
  words tsquery;
  own tsquery;
begin
  if q is null or length(btrim(q)) not between 1 and 200 then
    perform pgscribe.reject('q', 'must have 1 to 200 characters', 'Search for a few words, or a "phrase".');
  elsif "limit" is null or "limit" not between 1 and 101 then
    perform pgscribe.reject('limit', 'must be from 1 to 100', 'Ask for more after the last one.');
  end if;
  words := pgscribe.search_query(btrim(q));
  if owner is null or numnode(words) = 0 then
    return;
  end if;
  own := (''' ' || owner || '''')::tsquery && words;
  return query
    with found as materialized (
      select p.id, p.created_at from public.processing_jobs p
       where p.user_id = owner and p.status = 'completed' and p.result ->> 'text' <> ''
         and pgscribe.search_document(p.user_id, p.result) @@ own
         and (after_created_at is null or (p.created_at, p.id) < (after_created_at, coalesce(after_id, '00000000-0000-0000-0000-000000000000')))
       order by p.created_at desc, p.id desc limit "limit")
    select p.id, p.created_at, p.file_path, p.result ->> 'language', p.audio_seconds,
           pgscribe.search_hits(p.result, coalesce(pgscribe.search_words(btrim(q), words), words), (
             select jsonb_object_agg(c.segment, c.text)
               from public.transcript_corrections c where c.job_id = p.id and c.text is not null))
      from found f join public.processing_jobs p on p.id = f.id
     order by f.created_at desc, f.id desc;
end $$;
comment on function public.search_transcripts is
  'Finds words in the transcripts of the caller''s completed jobs, as they were transcribed, newest first, after the given place in the list. q: 1 to 200 characters: words, "a phrase", or, -without. hits: up to three segments as corrected, none that is left out, with the matches between the control characters 2 and 3.';
revoke execute on function pgscribe.search_hits from public, anon, authenticated, service_role;
