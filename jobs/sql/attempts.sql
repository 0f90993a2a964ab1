-- What an attempt may read and write, and only while it holds its job.

-- load --
select p.*
  from pgscribe.lock_held_job(%(queue_job_id)s, %(worker_id)s, %(attempts)s) held
  join public.processing_jobs p using (job_id)

-- write_progress --
update public.processing_jobs p set progress = %(progress)s
  from pgscribe.lock_held_job(%(queue_job_id)s, %(worker_id)s, %(attempts)s) held
 where p.job_id = held.job_id and p.progress < %(progress)s

-- write_result --
update public.processing_jobs p
   set result = %(result)s, audio_seconds = %(audio_seconds)s
  from pgscribe.lock_held_job(%(queue_job_id)s, %(worker_id)s, %(attempts)s) held
 where p.job_id = held.job_id
returning p.id

-- write_error --
update public.processing_jobs p
   set error_code = %(error_code)s, error = %(error)s
  from pgscribe.lock_held_job(%(queue_job_id)s, %(worker_id)s, %(attempts)s) held
 where p.job_id = held.job_id
returning p.id
