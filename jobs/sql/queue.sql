-- What a worker says to the queue. The functions are pgscribe's, in db/migrations.

-- register --
select worker_id from procrastinate.procrastinate_register_worker_v1()

-- turn --
select pgscribe.turn(
  %(worker_id)s,
  array(select e from jsonb_populate_recordset(null::pgscribe.ended_attempt, %(ended)s) e),
  %(wanted)s, %(other_queues)s, %(max_attempts)s, %(announcement)s)

-- beat --
select pgscribe.beat(
  %(worker_id)s, %(held)s, %(attempts)s, %(queue_jobs)s,
  %(stall_timeout)s, %(max_attempts)s, %(sweep)s, %(echo_channel)s)

-- sign_off --
select pgscribe.sign_off(%(worker_id)s)

-- prepare_connection --
-- A worker's statements are short. What takes longer is stuck, and is tried again.
select set_config('search_path', 'procrastinate, pg_temp', false),
       set_config('statement_timeout', '8s', false), set_config('lock_timeout', '4s', false)
