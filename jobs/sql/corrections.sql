-- What owners have corrected in their transcripts: under row level security.

-- list --
select segment, text, speaker, updated_at from public.transcript_corrections where job_id = %(id)s order by segment

-- lock --
-- Until the transaction ends, others who correct the same transcript wait, so that nobody locks its rows in another order.
select pg_advisory_xact_lock(hashtextextended('pgscribe.corrections ' || %(id)s::uuid, 0))

-- set_texts --
-- The speaker stays as it is, also where somebody else sets it at the same time.
insert into public.transcript_corrections (job_id, segment, text)
select %(id)s, c.segment, c.text from unnest(%(segments)s::integer[], %(values)s::text[]) c (segment, text)
on conflict (job_id, segment) do update set text = excluded.text

-- set_speakers --
insert into public.transcript_corrections (job_id, segment, speaker)
select %(id)s, c.segment, c.speaker from unnest(%(segments)s::integer[], %(values)s::text[]) c (segment, speaker)
on conflict (job_id, segment) do update set speaker = excluded.speaker
