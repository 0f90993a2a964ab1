-- What a worker says to the queue. The functions are pgscribe's, in db/migrations.

-- register --
select worker_id from procrastinate.procrastinate_register_worker_v1()

-- turn --
select jobs, others, more, missed, due, due_in, busy, abort, light_more, light_due, light_due_in, light_busy
  from pgscribe.turn(
    %(worker_id)s, %(ended)s, %(wanted)s, %(running)s, %(other_queues)s, %(max_attempts)s, %(announcement)s,
    %(wanted_light)s, %(light_announcement)s)

-- beat --
select pgscribe.beat(
  %(worker_id)s, %(held)s, %(attempts)s, %(queue_jobs)s,
  %(stall_timeout)s, %(max_attempts)s, %(sweep)s, %(echo_channel)s)

-- sign_off --
select pgscribe.sign_off(%(worker_id)s)

-- prepare_connection --
-- A worker's statements are short. What takes longer is stuck, and is tried again. Compiling them would
-- take longer than they do.
select set_config('search_path', 'procrastinate, pg_temp', false),
       set_config('statement_timeout', '8s', false), set_config('lock_timeout', '4s', false),
       set_config('jit', 'off', false)
