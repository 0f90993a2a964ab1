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
select public.limit_owner(%(owner)s, %(max_running)s, %(weight)s)
