-- What an attempt writes to its job while it runs, and only while it holds it: attempt and status
-- are the fence, and change only with the row locked.

-- write_progress --
update public.processing_jobs set progress = %(progress)s, updated_at = now()
 where id = %(job_id)s and attempt = %(attempt)s and status = 'processing' and progress < %(progress)s
