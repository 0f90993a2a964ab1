-- Transcripts as far as they are there, as their owners see them: under row level security.

-- partial --
select ready, chunks, coalesce(text, '') as text from public.partial_transcript(%(id)s)

-- ready_chunks --
select c.start_seconds, c.end_seconds, c.result
  from public.processing_job_chunks c
 where c.job_id = %(id)s and c.index < (select ready from public.partial_transcript(%(id)s))
 order by c.index
