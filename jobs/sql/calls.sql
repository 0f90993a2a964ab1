-- What an attempt notes of the calls that it makes. The functions are pgscribe's, in db/migrations; each
-- returns false where the attempt no longer holds its job, and has then done nothing.

-- load_calls --
select held, preparation, chunks from pgscribe.load_calls(%(job_id)s, %(attempt)s)

-- waited_seconds --
select pgscribe.waited_seconds(%(job_id)s)

-- audio_url --
-- By name, so that workers run before and after the migration that adds the column.
select (select to_jsonb(j) ->> 'audio_url' from public.processing_jobs j where j.id = %(job_id)s)

-- job_limits --
select max_file_bytes, max_seconds from pgscribe.job_limits(%(job_id)s)

-- note_call --
select pgscribe.note_call(%(job_id)s, %(attempt)s, %(chunk)s, %(call_id)s)

-- forget_call --
select pgscribe.forget_call(%(job_id)s, %(attempt)s, %(chunk)s, %(call_id)s)

-- fail_call --
select pgscribe.fail_call(
  %(job_id)s, %(attempt)s, %(chunk)s, %(call_id)s, %(cpu_seconds)s, %(gpu_seconds)s)

-- store_plan --
select pgscribe.store_plan(
  %(job_id)s, %(attempt)s, %(call_id)s, %(plan)s, %(cpu_seconds)s, %(gpu_seconds)s)

-- forget_plan --
select pgscribe.forget_plan(%(job_id)s, %(attempt)s)

-- forget_audio --
select pgscribe.forget_audio(%(job_id)s, %(attempt)s)

-- release_calls --
select held, calls, audio from pgscribe.release_calls(%(job_id)s, %(attempt)s, %(known)s)

-- store_chunk --
select pgscribe.store_chunk(
  %(job_id)s, %(attempt)s, %(chunk)s, %(result)s, %(cpu_seconds)s, %(gpu_seconds)s)

-- note_usage --
select pgscribe.note_usage(%(job_id)s, %(attempt)s, %(gpu_second_price)s, %(cpu_second_price)s)

-- stray_calls --
select pgscribe.stray_calls(%(batch)s)

-- forget_stray_calls --
select pgscribe.forget_stray_calls(%(calls)s)

-- stray_audio --
select pgscribe.stray_audio(%(batch)s)

-- forget_stray_audio --
select pgscribe.forget_stray_audio(%(files)s)
