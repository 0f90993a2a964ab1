-- What operators do. What begins with operator_ runs as the user, and the database asks whether they are one; the rest
-- is for the command line.

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
  %(owner)s, %(max_running)s, %(weight)s::real, %(max_queued)s, %(max_audio_seconds_per_month)s, %(max_file_bytes)s, %(max_duration)s)

-- limit_owners --
select public.limit_owners(
  %(max_running)s, %(max_queued)s, %(max_audio_seconds_per_month)s, %(max_file_bytes)s, %(max_duration)s)

-- show_limits --
-- What an owner may have, or without one what owners have who have no limits of their own.
select l.name as "limit", coalesce(l.own, l.usual) as value, l.own is not null or %(owner)s::uuid is null as is_own
  from pgscribe.default_limits d
  join pgscribe.queue_settings s on s.queue_name = 'transcription'
  left join pgscribe.owner_limits o on o.owner_id = %(owner)s
 cross join lateral (values
   ('max_running', o.max_running::float8, s.max_running_per_owner::float8),
   ('weight', o.weight::float8, 1),
   ('max_queued', o.max_queued::float8, d.max_queued::float8),
   ('max_audio_seconds_per_month', o.max_audio_seconds_per_month, d.max_audio_seconds_per_month),
   ('max_file_bytes', o.max_file_bytes::float8, d.max_file_bytes::float8),
   ('max_duration', o.max_duration, d.max_duration)) l (name, own, usual)

-- find_users --
select u.id, u.email from auth.users u
 where u.deleted_at is null and (u.id::text = lower(%(user)s) or lower(u.email) = lower(%(user)s)) limit 2

-- add_operator --
insert into pgscribe.operators (user_id) values (%(id)s) on conflict do nothing

-- remove_operator --
delete from pgscribe.operators where user_id = %(id)s

-- list_operators --
select o.user_id, u.email, o.added_at
  from pgscribe.operators o join auth.users u on u.id = o.user_id order by o.added_at, o.user_id

-- is_operator --
select public.is_operator()

-- operator_overview --
select public.operator_overview(%(hours)s, %(stall_timeout)s)

-- operator_metrics --
select public.operator_metrics(%(stall_timeout)s)

-- limit_metrics_time --
-- A scrape waits no longer than that, and the next one asks again.
select set_config('statement_timeout', '3s', true)

-- operator_jobs --
select id, owner_id, email, file_path, options, status, progress, attempt, created_at, started_at, completed_at, due_at,
       audio_seconds, error_code, error, usage
  from public.operator_jobs(
    %(status)s, %(owner)s, %(error_code)s, %(limit)s, %(after_at)s, %(after_id)s)

-- operator_cancel_jobs --
select changed, more, 0 as refused, at
  from public.operator_cancel_jobs(%(ids)s, %(status)s, %(owner)s, %(error_code)s)

-- operator_retry_jobs --
select changed, more, refused, at
  from public.operator_retry_jobs(%(ids)s, %(status)s, %(owner)s, %(error_code)s, %(ended_before)s)

-- operator_deliveries --
select id, owner_id, email, endpoint_id, job_id, url, event, status, attempts, created_at, due_at, completed_at,
       response_status, error_code, error
  from public.operator_deliveries(%(status)s, %(owner)s, %(limit)s, %(after_at)s, %(after_id)s)

-- operator_replay_deliveries --
select public.operator_replay_deliveries(%(ids)s)

-- operator_pause_queue --
select public.operator_pause_queue()

-- operator_resume_queue --
select public.operator_resume_queue()

-- operator_pause_owner --
select public.operator_pause_owner(%(owner)s)

-- operator_resume_owner --
select public.operator_resume_owner(%(owner)s)
