-- What an operator does to queues and owners.

-- pause_queue --
select public.pause_queue(%(name)s)

-- resume_queue --
select public.resume_queue(%(name)s)

-- pause_owner --
select public.pause_owner(%(owner)s)

-- resume_owner --
select public.resume_owner(%(owner)s)

-- limit_owner --
select public.limit_owner(
  %(owner)s, %(max_running)s, %(weight)s, %(max_queued)s, %(max_audio_seconds_per_month)s, %(max_file_bytes)s, %(max_duration)s)

-- limit_owners --
select public.limit_owners(
  %(max_running)s, %(max_queued)s, %(max_audio_seconds_per_month)s, %(max_file_bytes)s, %(max_duration)s)
