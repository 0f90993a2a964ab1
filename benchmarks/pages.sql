-- A transcript of four hours: 4,000 segments of ten words, as a job that has completed. Run as a superuser, without triggers.

-- fill --
with words as (
  select s, jsonb_agg(jsonb_build_object(
           'start', round((s * 3.6 + w * 0.35)::numeric, 2), 'end', round((s * 3.6 + w * 0.35 + 0.3)::numeric, 2),
           'word', case when w = 9 then 'sea.' else (array['lighthouse', 'keepers', 'of', 'everything', 'they', 'had', 'written', 'down'])[1 + (s + w) %% 8] end,
           'probability', 0.9) order by w) as words
    from generate_series(0, 3999) s cross join generate_series(0, 9) w group by s),
segments as (
  select jsonb_agg(jsonb_build_object(
           'start', round((s * 3.6)::numeric, 2), 'end', round((s * 3.6 + 3.5)::numeric, 2),
           'text', (select string_agg(w ->> 'word', ' ') from jsonb_array_elements(words) w), 'words', words,
           'avg_logprob', -0.2, 'no_speech_prob', 0.01, 'compression_ratio', 1.4)
         || case when s %% 97 = 0 then '{"flags": ["low_confidence"]}' else '{}'::jsonb end order by s) as segments
    from words),
finished as (
  select gen_random_uuid() as id, n, now() - make_interval(mins => n) as at from generate_series(0, 99) n),
queue_jobs as (
  insert into procrastinate.procrastinate_jobs (id, queue_name, task_name, args, status, attempts)
  select n + 1, 'transcription', 'transcribe', jsonb_build_object('processing_job_id', id), 'succeeded', 1 from finished),
jobs as (
  insert into public.processing_jobs
    (id, user_id, file_path, job_id, status, progress, attempt, started_at, completed_at, created_at, audio_seconds, options, result)
  select id, %(owner)s, %(owner)s || '/' || case n when 0 then 'four hours.wav' else format('recording %%s.wav', n) end, (n + 1)::text,
         'completed', 1, 1, at, at, at, 14400, '{"model": "base"}',
         case n when 0 then jsonb_build_object('text', '', 'language', 'en', 'duration', 14400, 'engine', 'faster-whisper',
           'model', 'base', 'segments', (select segments from segments)) else '{"text": "", "segments": []}' end
    from finished returning id, file_path),
waveforms as (
  insert into public.processing_job_waveforms (job_id, peaks)
  select id, (select array_agg(40 + n * 7919 %% 200) from generate_series(1, 2000) n) from jobs where file_path like '%%/four hours.wav')
select id from jobs where file_path like '%%/four hours.wav'
