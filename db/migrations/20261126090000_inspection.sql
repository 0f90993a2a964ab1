-- What somebody sees who looks at jobs and the queue with SQL: in the Table editor, in the SQL editor, by rpc.
-- docs/dashboard.md shows it. Row level security decides as ever: no policy is widened, and both views run as whoever
-- asks. What lies in tables that no API role may read comes from functions that ask who that is.

-- In the SQL editor, and with a secret key, row level security does not apply: they see and may everything anyway.
create or replace function pgscribe.require_operator() returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if not pgscribe.is_operator() and pgscribe.is_one_user() then
    raise insufficient_privilege using
      message = 'Only operators may do that', hint = 'Whoever runs pgscribe makes one: pgscribe operators add <user id or e-mail address>';
  end if;
end $$;
comment on function pgscribe.require_operator is
  'Refuses whoever is no operator, unless row level security does not apply to them anyway, as to postgres and service_role.';

grant execute on function
  public.operator_jobs, public.operator_cancel_jobs, public.operator_retry_jobs, public.operator_overview,
  public.operator_deliveries, public.operator_replay_deliveries, public.operator_pause_owner, public.operator_resume_owner
  to service_role;

-- Pauses say what is wrong ---------------------------------------------------------------------------------------

insert into pgscribe.queue_settings (queue_name) values ('maintenance') on conflict do nothing;

create function pgscribe.check_queue_name(queue_name text) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from pgscribe.queue_settings s where s.queue_name = check_queue_name.queue_name) then
    perform pgscribe.reject('queue_name', 'there is no queue ' || coalesce(quote_literal(left(queue_name, 60)), 'null'),
      'Give one of ' || (select string_agg(s.queue_name, ', ' order by s.queue_name) from pgscribe.queue_settings s) || '.');
  end if;
end $$;
comment on function pgscribe.check_queue_name is 'Refuses the name of a queue that there is not.';

create function pgscribe.check_owner_id(owner_id uuid) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from auth.users u where u.id = owner_id) then
    perform pgscribe.reject('owner_id', 'there is no user ' || coalesce(owner_id::text, 'null'), 'select id, email from auth.users');
  end if;
end $$;
comment on function pgscribe.check_owner_id is 'Refuses the id of a user that there is not.';

create or replace function public.pause_queue(queue_name text default 'transcription') returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.check_queue_name(pause_queue.queue_name);
  update pgscribe.queue_settings s set paused_at = coalesce(s.paused_at, now()) where s.queue_name = pause_queue.queue_name;
end $$;
comment on function public.pause_queue is
  'Starts no more jobs of a queue (transcription, webhooks or maintenance) until resume_queue; running ones go on.';

create or replace function public.resume_queue(queue_name text default 'transcription') returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.check_queue_name(resume_queue.queue_name);
  update pgscribe.queue_settings s set paused_at = null where s.queue_name = resume_queue.queue_name;
  perform pgscribe.wake_workers();
end $$;

create or replace function public.pause_owner(owner_id uuid) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform pgscribe.check_owner_id(pause_owner.owner_id);
  insert into pgscribe.owner_limits as l (owner_id, paused_at) values (pause_owner.owner_id, now())
  on conflict (owner_id) do update set paused_at = coalesce(l.paused_at, excluded.paused_at);
end $$;

create or replace function public.resume_owner(owner_id uuid) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
begin
  perform pgscribe.check_owner_id(resume_owner.owner_id);
  update pgscribe.owner_limits l set paused_at = null where l.owner_id = resume_owner.owner_id;
  -- They start level with the others, not with what they would have been given meanwhile.
  perform from pgscribe.fair_queue for update;
  update pgscribe.owner_shares s set waiting = false where s.owner_id = resume_owner.owner_id;
  insert into pgscribe.woken_owners (owner_id) values (resume_owner.owner_id);
  perform pgscribe.wake_workers();
end $$;

-- Who calls it without arguments, as before, calls the one that follows in the same transaction.
-- squawk-ignore ban-drop-function
drop function public.operator_pause_queue();
create function public.operator_pause_queue(queue_name text default 'transcription') returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.require_operator();
  perform public.pause_queue(operator_pause_queue.queue_name);
end $$;
comment on function public.operator_pause_queue is
  'For operators: starts no more jobs of a queue (transcription, webhooks or maintenance) until operator_resume_queue; running ones go on.';

-- Who calls it without arguments, as before, calls the one that follows in the same transaction.
-- squawk-ignore ban-drop-function
drop function public.operator_resume_queue();
create function public.operator_resume_queue(queue_name text default 'transcription') returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.require_operator();
  perform public.resume_queue(operator_resume_queue.queue_name);
end $$;
comment on function public.operator_resume_queue is 'For operators: starts jobs of a queue again.';

revoke execute on function public.operator_pause_queue, public.operator_resume_queue from public, anon;
grant execute on function public.operator_pause_queue, public.operator_resume_queue to authenticated, service_role;

-- The newest of everybody's jobs are what the dashboard asks for first. Without it that reads and sorts all there are.
-- The condition holds for every job, but only queries that say so may use the index. An owner's list must not: if there
-- are few owners, the planner would look for this one's jobs among all those that are newer.
-- Nothing is written to the table while it is made: workers and requests try again.
-- squawk-ignore require-concurrent-index-creation
create index processing_jobs_created_idx on public.processing_jobs (created_at desc, id desc) where attempt >= 0;

-- One job, one row -------------------------------------------------------------------------------------------------
-- The functions are called for each row that is returned, after the limit; those of the queue for jobs that wait or run.

create function pgscribe.email_for_reader(user_id uuid) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select u.email from auth.users u
     where u.id = email_for_reader.user_id and (u.id = auth.uid() or not pgscribe.is_one_user() or pgscribe.is_operator()));
end $$;
comment on function pgscribe.email_for_reader is 'A user''s e-mail address, if it is the caller''s, or the caller is an operator or sees all users anyway.';

create function pgscribe.worker_of(queue_job text, out worker_id bigint, out last_heartbeat timestamptz)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  select q.worker_id, w.last_heartbeat into worker_of.worker_id, worker_of.last_heartbeat
    from procrastinate.procrastinate_jobs q left join procrastinate.procrastinate_workers w on w.id = q.worker_id
   where q.id = queue_job::bigint and q.status::text = 'doing';
end $$;
comment on function pgscribe.worker_of is 'The worker that runs a queue job, and when it was last heard of.';

create function pgscribe.is_held_back(owner uuid) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return exists (select from pgscribe.queue_settings s where s.queue_name = 'transcription' and s.paused_at is not null)
      or exists (select from pgscribe.owner_limits l where l.owner_id = owner and l.paused_at is not null);
end $$;
comment on function pgscribe.is_held_back is 'Whether an owner''s jobs are not started, since they or the queue are paused.';

create function pgscribe.share_of(owner uuid) returns double precision
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return (select s.virtual_time from pgscribe.owner_shares s where s.owner_id = owner);
end $$;
comment on function pgscribe.share_of is 'What an owner has been given, in audio-seconds by weight: whoever has been given least is served next.';

create function pgscribe.ahead_in_line(owner uuid, priority smallint, queue_job text) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
begin
  -- Two ranges of the index of waiting jobs: one condition for both would read all that come after this one, too.
  return least(1000, (
    select count(*) from (
      select from public.processing_jobs p
       where p.user_id = owner and p.status = 'queued' and p.due_at is null and p.priority > ahead_in_line.priority
       order by p.priority desc, p.job_id::bigint limit 1000) a) + (
    select count(*) from (
      select from public.processing_jobs p
       where p.user_id = owner and p.status = 'queued' and p.due_at is null
         and p.priority = ahead_in_line.priority and p.job_id::bigint < ahead_in_line.queue_job::bigint
       order by p.job_id::bigint limit 1000) b));
end $$;
comment on function pgscribe.ahead_in_line is 'How many of an owner''s jobs that may start now come before this one, counted up to 1000.';

-- Written as they are, the conditions on status leave the planner no index of all open deliveries, which it takes for a
-- short one as long as its statistics know of none.
create view public.job_inspection with (security_invoker = true) as
select p.id, p.user_id, pgscribe.email_for_reader(p.user_id) as email, p.file_path, p.status,
       case
         when p.completed_at is not null then p.status
         when p.cancel_requested_at is not null then 'cancelling'
         when p.status = 'queued' and p.due_at > now() then case p.attempt when 0 then 'scheduled' else 'backing off' end
         when p.status = 'queued' then case when pgscribe.is_held_back(p.user_id) then 'paused' else 'waiting' end
         when (select c.job_id from public.processing_job_chunks c where c.job_id = p.id limit 1) is not null then 'transcribing'
         else 'preparing' end as phase,
       p.progress, p.note, p.attempt, p.max_attempts,
       p.created_at, p.scheduled_at, p.started_at, p.completed_at,
       case when p.status = 'queued' and (p.due_at > now()) is not true
         then greatest(p.created_at, p.scheduled_at, p.retry_requested_at) end as waiting_since,
       case when p.status = 'queued' then p.due_at end as next_attempt_at,
       case when p.attempt = 1
         then greatest(extract(epoch from p.started_at - greatest(p.created_at, p.scheduled_at)), 0)::float8 end as pickup_seconds,
       case when p.status = 'processing' then extract(epoch from now() - p.started_at)
            when p.completed_at is not null then extract(epoch from p.completed_at - p.started_at) end::float8 as run_seconds,
       p.audio_seconds,
       case when p.status = 'completed'
         then p.audio_seconds / nullif(extract(epoch from p.completed_at - p.started_at), 0)::float8 end as real_time_factor,
       'transcription'::text as queue_name, p.job_id::bigint as queue_job_id, p.priority,
       case when p.status = 'queued' then pgscribe.share_of(p.user_id) end as owner_virtual_time,
       case when p.status = 'queued' and p.due_at is null
         then pgscribe.ahead_in_line(p.user_id, p.priority, p.job_id) end as ahead_in_line,
       case when p.status = 'processing' then (pgscribe.worker_of(p.job_id)).worker_id end as worker_id,
       case when p.status = 'processing' then (pgscribe.worker_of(p.job_id)).last_heartbeat end as worker_last_heartbeat,
       (select count(*) from public.processing_job_chunks c where c.job_id = p.id) as chunks,
       (select count(*) from public.processing_job_chunks c where c.job_id = p.id and c.status = 'completed') as chunks_done,
       (p.usage ->> 'calls')::bigint as calls, (p.usage ->> 'gpu_seconds')::float8 as gpu_seconds,
       (p.usage ->> 'cpu_seconds')::float8 as cpu_seconds, (p.usage ->> 'estimated_cost')::float8 as estimated_cost,
       p.error_code, p.error, p.cancel_requested_at, p.retry_requested_at,
       (select count(*) from public.webhook_deliveries d where d.job_id = p.id and d.status || '' in ('queued', 'sending')) as deliveries_pending,
       (select count(*) from public.webhook_deliveries d where d.job_id = p.id and d.status || '' = 'failed') as deliveries_failed
  from public.processing_jobs p where p.attempt >= 0;
comment on view public.job_inspection is
  'One row for each job that you may see, with what one asks about it: what it does, since when, with which worker, and what went wrong. Without transcripts. Filter by id, user_id, status or error_code, or order by created_at with a limit. Times in seconds.';
comment on column public.job_inspection.id is 'The job.';
comment on column public.job_inspection.user_id is 'Its owner.';
comment on column public.job_inspection.email is 'The owner''s e-mail address: your own, or anybody''s for operators and in the SQL editor.';
comment on column public.job_inspection.file_path is 'Path of the audio in storage.';
comment on column public.job_inspection.status is 'queued, processing, completed, failed or cancelled.';
comment on column public.job_inspection.phase is
  'More than the status says: scheduled, waiting, paused (the queue or its owner is), backing off (until next_attempt_at), preparing, transcribing, cancelling; or the status with which it ended.';
comment on column public.job_inspection.progress is 'Share of the audio transcribed by the current attempt, 0 to 1.';
comment on column public.job_inspection.note is 'What whoever helps with the job last said about it.';
comment on column public.job_inspection.attempt is 'How many times a worker has started it.';
comment on column public.job_inspection.max_attempts is 'How many attempts it may have; null: as many as the workers'' settings say.';
comment on column public.job_inspection.created_at is 'When it was submitted.';
comment on column public.job_inspection.scheduled_at is 'It starts no earlier than this.';
comment on column public.job_inspection.started_at is 'When the last attempt was claimed by a worker.';
comment on column public.job_inspection.completed_at is 'When it ended.';
comment on column public.job_inspection.waiting_since is 'For jobs that may start now: since when they could have, as they were submitted, due or retried.';
comment on column public.job_inspection.next_attempt_at is 'When it may start, if it waits for its time or after a failed attempt.';
comment on column public.job_inspection.pickup_seconds is 'From submission or schedule to the start, of jobs that one attempt was made at.';
comment on column public.job_inspection.run_seconds is 'How long the last attempt has run, or ran.';
comment on column public.job_inspection.audio_seconds is 'Length of the audio, once known.';
comment on column public.job_inspection.real_time_factor is 'Of completed jobs: audio by the time that it took; 10 is a minute of audio in six seconds.';
comment on column public.job_inspection.queue_name is 'The queue, as pause_queue knows it.';
comment on column public.job_inspection.queue_job_id is 'The queue job in procrastinate.procrastinate_jobs; null once retention has removed it.';
comment on column public.job_inspection.priority is 'Among its owner''s jobs, the highest is first.';
comment on column public.job_inspection.owner_virtual_time is
  'For jobs that wait: the fair-share tag, which is what their owner has been given, in audio-seconds by weight. The owner with the lowest is served next.';
comment on column public.job_inspection.ahead_in_line is 'How many of its owner''s jobs that may start now come before it, counted up to 1000.';
comment on column public.job_inspection.worker_id is 'The worker that runs it.';
comment on column public.job_inspection.worker_last_heartbeat is 'When that worker was last heard of; it says so every 10 seconds.';
comment on column public.job_inspection.chunks is 'Into how many chunks the audio was split; they are kept until retention removes the queue job.';
comment on column public.job_inspection.chunks_done is 'How many of them are transcribed.';
comment on column public.job_inspection.calls is 'How many calls were made for it, by the end of its last attempt.';
comment on column public.job_inspection.gpu_seconds is 'What the calls took of GPUs.';
comment on column public.job_inspection.cpu_seconds is 'What the calls took of CPUs.';
comment on column public.job_inspection.estimated_cost is 'What that cost, at the prices that the workers were told.';
comment on column public.job_inspection.error_code is 'Stable code of the last attempt''s error.';
comment on column public.job_inspection.error is 'The last attempt''s error, for people.';
comment on column public.job_inspection.cancel_requested_at is 'When somebody asked to cancel it.';
comment on column public.job_inspection.retry_requested_at is 'When somebody last asked to run it again.';
comment on column public.job_inspection.deliveries_pending is 'Webhook deliveries about it that wait or are under way.';
comment on column public.job_inspection.deliveries_failed is 'Webhook deliveries about it that have failed for good.';
revoke all on public.job_inspection from public, anon, authenticated, service_role;
grant select on public.job_inspection to authenticated, service_role;

create function public.operator_inspect_jobs(
  with_status text default null, of_owner uuid default null, with_error_code text default null, "limit" integer default 50,
  after_created_at timestamptz default null, after_id uuid default null)
returns setof public.job_inspection
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform pgscribe.require_operator();
  return query
    select i.*
      from pgscribe.newest_jobs(with_status, of_owner, with_error_code, least("limit", 1000), after_created_at, after_id) n
     cross join lateral (select * from public.job_inspection j where j.id = n.id offset 0) i
     order by n.created_at desc, n.id desc;
end $$;
comment on function public.operator_inspect_jobs is
  'For operators: everybody''s jobs as job_inspection shows them, chosen and paged like operator_jobs.';
revoke execute on function public.operator_inspect_jobs from public, anon;
grant execute on function public.operator_inspect_jobs to authenticated, service_role;

-- The queue, one row ------------------------------------------------------------------------------------------------
-- Made of the parts that operator_overview is made of.

create function pgscribe.queue_health()
returns table (
  queued bigint, scheduled bigint, processing bigint, stalled bigint, oldest_waiting_seconds double precision,
  pickup_p50_seconds double precision, pickup_p95_seconds double precision,
  completed_last_hour bigint, failed_last_hour bigint, cancelled_last_hour bigint, most_frequent_error_code text,
  real_time_factor double precision, workers_alive bigint, workers_lost bigint, last_heartbeat timestamptz,
  paused_queues text[], paused_owners bigint,
  deliveries_waiting bigint, deliveries_sending bigint, oldest_delivery_seconds double precision,
  deliveries_failed_last_hour bigint, disabled_endpoints bigint)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off as $$
declare
  jobs jsonb;
  webhooks jsonb;
  alive_since timestamptz := now() - interval '30 s';
begin
  perform pgscribe.require_operator();
  jobs := pgscribe.overview_of_jobs(now() - interval '1 hour', interval '2 hours');
  webhooks := pgscribe.overview_of_webhooks(1);
  return query
    select (jobs #>> '{queue,states,queued}')::bigint, (jobs #>> '{queue,states,scheduled}')::bigint,
           (jobs #>> '{queue,states,processing}')::bigint,
           (select count(*) from public.processing_jobs p
              join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
              left join procrastinate.procrastinate_workers w on w.id = q.worker_id
             where p.status = 'processing' and q.status::text = 'doing' and (w.last_heartbeat > alive_since) is not true),
           (jobs #>> '{queue,oldest_queued_seconds}')::float8,
           (jobs #>> '{times,wait,p50}')::float8, (jobs #>> '{times,wait,p95}')::float8,
           (jobs #>> '{ended,completed}')::bigint, (jobs #>> '{ended,failed}')::bigint, (jobs #>> '{ended,cancelled}')::bigint,
           jobs #>> '{failures,0,error_code}', (jobs #>> '{times,real_time_factor,p50}')::float8,
           workers.alive, workers.lost, workers.last_heartbeat,
           array(select s.queue_name from pgscribe.queue_settings s where s.paused_at is not null order by 1),
           (select count(*) from pgscribe.owner_limits l where l.paused_at is not null),
           (webhooks ->> 'queued')::bigint + (webhooks ->> 'waiting')::bigint, (webhooks ->> 'sending')::bigint,
           (webhooks ->> 'oldest_queued_seconds')::float8, (webhooks ->> 'failed')::bigint, (webhooks ->> 'disabled_endpoints')::bigint
      from (select count(*) filter (where w.last_heartbeat > alive_since) as alive,
                   count(*) filter (where w.last_heartbeat <= alive_since) as lost, max(w.last_heartbeat) as last_heartbeat
              from procrastinate.procrastinate_workers w) workers;
end $$;
comment on function pgscribe.queue_health is 'What public.queue_health shows, to operators and whoever sees all anyway; others are refused.';

create view public.queue_health with (security_invoker = true) as select * from pgscribe.queue_health();
comment on view public.queue_health is
  'How the queue does, in one row: for operators, and in the SQL editor. Times in seconds; operator_overview() says more.';
comment on column public.queue_health.queued is 'Jobs that may start now.';
comment on column public.queue_health.scheduled is 'Jobs that wait for their time, or for another attempt.';
comment on column public.queue_health.processing is 'Jobs that run.';
comment on column public.queue_health.stalled is 'Of those, how many are held by a worker that has not been heard of for 30 seconds; another one takes them over.';
comment on column public.queue_health.oldest_waiting_seconds is 'How long the oldest job that may start has waited.';
comment on column public.queue_health.pickup_p50_seconds is 'From submission or schedule to the start, of jobs that ended in the last hour: the median.';
comment on column public.queue_health.pickup_p95_seconds is 'The same: 95 of 100 waited less.';
comment on column public.queue_health.completed_last_hour is 'Jobs that completed in the last hour.';
comment on column public.queue_health.failed_last_hour is 'Jobs that failed in the last hour.';
comment on column public.queue_health.cancelled_last_hour is 'Jobs that were cancelled in the last hour.';
comment on column public.queue_health.most_frequent_error_code is 'The error that most of those that failed have.';
comment on column public.queue_health.real_time_factor is 'Audio by the time that it took, of jobs that completed in the last hour: the median.';
comment on column public.queue_health.workers_alive is 'Workers that were heard of in the last 30 seconds.';
comment on column public.queue_health.workers_lost is 'Workers that have neither signed off nor been heard of since.';
comment on column public.queue_health.last_heartbeat is 'When any worker was last heard of.';
comment on column public.queue_health.paused_queues is 'Queues that pause_queue has paused.';
comment on column public.queue_health.paused_owners is 'How many owners pause_owner has paused.';
comment on column public.queue_health.deliveries_waiting is 'Webhook deliveries that may start now, or wait for another attempt.';
comment on column public.queue_health.deliveries_sending is 'Webhook deliveries under way.';
comment on column public.queue_health.oldest_delivery_seconds is 'How long the oldest delivery that may start has waited.';
comment on column public.queue_health.deliveries_failed_last_hour is 'Webhook deliveries that were given up in the last hour.';
comment on column public.queue_health.disabled_endpoints is 'Endpoints to which nothing is sent, since they answered 410 or nothing came through.';
revoke all on public.queue_health from public, anon, authenticated, service_role;
grant select on public.queue_health to authenticated, service_role;

revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
grant execute on function pgscribe.search_document(uuid, jsonb) to authenticated, service_role;
-- What the views call, as whoever asks; pg_read_all_data is for the dashboard's read-only user.
grant execute on function
  pgscribe.email_for_reader, pgscribe.worker_of, pgscribe.is_held_back, pgscribe.share_of, pgscribe.ahead_in_line, pgscribe.queue_health
  to authenticated, service_role, pg_read_all_data;
