-- How an attempt ends its queue job, if it still holds it.

-- finish --
select procrastinate.procrastinate_finish_job_v1(
         held.job_id::bigint, %(status)s::procrastinate.procrastinate_job_status, %(delete_job)s)
  from pgscribe.lock_held_job(%(queue_job_id)s, %(worker_id)s, %(attempts)s) held

-- retry --
select procrastinate.procrastinate_retry_job_v2(
         held.job_id::bigint, %(retry_at)s, %(priority)s, %(queue)s, %(lock)s)
  from pgscribe.lock_held_job(%(queue_job_id)s, %(worker_id)s, %(attempts)s) held
