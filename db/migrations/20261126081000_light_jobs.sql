-- Light jobs, which are deliveries of webhooks and maintenance, have slots of their own: neither waits for an hour's
-- audio, nor takes a slot from one.

-- Deliveries may be many. What is left in it holds a few rows.
drop index procrastinate.pgscribe_jobs_others_idx;
create index pgscribe_jobs_others_idx on procrastinate.procrastinate_jobs ((coalesce(scheduled_at, '-infinity')))
  where status in ('todo', 'aborting') and queue_name not in ('transcription', 'webhooks');

drop function pgscribe.claim_jobs;
create function pgscribe.claim_jobs(
  worker bigint, wanted integer, default_max_attempts integer default 3,
  out jobs json, out claimed integer, out more boolean, out missed integer, out held_back boolean,
  out next_due timestamptz)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  now_serving double precision;
  default_max_running integer;
  paused boolean;
  any_news boolean;
  more_due boolean := false;
  planned uuid[];
  start_tags double precision[];
  idle uuid[];
  crowded_out boolean;
  free integer;
  rounds integer := 0;
  any_lost boolean;
  suspects uuid[];
  suspect uuid;
  avoided uuid[] := '{}';  -- jobs that can't be claimed now
  held_up uuid[] := '{}';  -- their owners, who are not idle though no job of theirs may be listed
  passed_over uuid[] := '{}';  -- owners who have nothing else that can be claimed now
  batch uuid[];
  batch_jobs json;
  locked_ids uuid[];
begin
  claimed := 0;
  missed := 0;
  more := false;
  held_back := false;
  -- What these look for may have gone by the time the lock is there; what is new will be notified.
  select f.virtual_time, s.max_running_per_owner, s.paused_at is not null,
         (select min(d.due_at) from public.processing_jobs d where d.status = 'queued' and d.due_at is not null),
         exists (select from pgscribe.woken_owners),
         exists (select from public.processing_jobs l where l.error_code = 'worker_lost' and l.status in ('queued', 'processing'))
    into now_serving, default_max_running, paused, next_due, any_news, any_lost
    from pgscribe.fair_queue f cross join pgscribe.queue_settings s
   where s.queue_name = 'transcription' for update of f;
  free := wanted;

  <<transcriptions>>
  begin
    exit transcriptions when paused or free = 0;
    -- Schedules and pauses that are over.
    if next_due <= now() then
      with due as (
        update public.processing_jobs p set due_at = null
         where p.id in (select d.id from public.processing_jobs d
                         where d.status = 'queued' and d.due_at <= now()
                         order by d.due_at limit 1000 for update skip locked)
        returning p.user_id),
      woken as (insert into pgscribe.woken_owners select distinct user_id from due)
      select true, count(*) = 1000 into any_news, more_due from due;
    end if;
    -- New jobs. An owner who comes back starts level with the others, not with what they saved up.
    if any_news then
      with news as (delete from pgscribe.woken_owners returning owner_id)
      insert into pgscribe.owner_shares as s (owner_id, virtual_time)
      select distinct owner_id, now_serving from news
      on conflict (owner_id) do update set
        waiting = true, virtual_time = greatest(s.virtual_time, excluded.virtual_time)
      where not s.waiting;
    end if;

    -- Whoever has lost as many workers as it has attempts but one may have killed them: a worker runs one such job at
    -- a time, so that what it kills next is not another one's last attempt.
    if any_lost then
      select array_agg(l.id) filter (where l.status = 'queued'),
             (array_agg(l.id) filter (where l.status = 'processing' and l.worker_id = worker))[1]
        into suspects, suspect
        from (select p.id, p.status, q.worker_id
                from public.processing_jobs p join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
               where p.error_code = 'worker_lost' and p.status in ('queued', 'processing')
                 and q.attempts + 1 >= coalesce(p.max_attempts, default_max_attempts)) l;
      if suspect is not null and suspects is not null then
        avoided := suspects;
      end if;
    end if;

    -- The owners who have been given least, and from each about as many jobs as their part of the batch.
    -- No job goes before the first one that was not listed: then the batch ends there. What turns out to be locked
    -- is left out of the next round; after some of them, so are the other jobs of its owner.
    loop
      rounds := rounds + 1;
      if avoided <> '{}' then
        held_up := array(select distinct p.user_id from public.processing_jobs p where p.id = any (avoided));
        if rounds > 4 then
          passed_over := passed_over || held_up;
        end if;
      end if;
      loop
        select array_agg(l.id order by l.start_tag, l.queue_job_id) filter (where l.start_tag <= l.horizon),
               array_agg(l.start_tag order by l.start_tag, l.queue_job_id) filter (where l.start_tag <= l.horizon),
               array_agg(l.owner_id) filter (where l.id is null),
               bool_or(l.horizon < 'Infinity'), bool_or(l.id is null and l.owners = free)
          into planned, start_tags, idle, more, crowded_out
          from (
            select *, coalesce(min(unlisted_tag) over (), 'Infinity') as horizon from (
              select c.owner_id, c.owners, j.id, j.queue_job_id,
                     c.virtual_time + (sum(j.seconds) over so_far - j.seconds) / c.weight as start_tag,
                     case when c.depth < least(c.room, free) and row_number() over so_far = c.depth
                       then c.virtual_time + sum(j.seconds) over so_far / c.weight end as unlisted_tag
                from (
                  select *, least(room, free, 1 + 2 * free / owners) as depth from (
                    select *, count(*) over () as owners from (
                      select s.owner_id, s.virtual_time, coalesce(l.weight, 1) as weight,
                             coalesce(l.max_running, default_max_running) - running.count as room
                        from pgscribe.owner_shares s
                        left join pgscribe.owner_limits l using (owner_id)
                       cross join lateral (
                         select count(*) from public.processing_jobs r
                          where r.user_id = s.owner_id and r.status = 'processing') running
                       where s.waiting and l.paused_at is null and coalesce(l.max_running, default_max_running) > running.count
                         and s.owner_id <> all (passed_over)
                       order by s.virtual_time limit free) least_given) counted) c
                left join lateral (
                  select p.id, p.priority, p.job_id::bigint as queue_job_id,
                         case when p.attempt = 0 or p.retry_requested_at > p.started_at then p.estimated_seconds else 0 end as seconds
                    from public.processing_jobs p
                   where p.user_id = c.owner_id and p.status = 'queued' and p.due_at is null and p.id <> all (avoided)
                   order by p.priority desc, p.job_id::bigint limit c.depth) j on true
              window so_far as (partition by c.owner_id order by j.priority desc, j.queue_job_id rows unbounded preceding)) listed) l;
        if idle is not null then
          update pgscribe.owner_shares set waiting = false where owner_id = any (idle) and owner_id <> all (held_up);
          passed_over := passed_over || idle;
        end if;
        exit when crowded_out is distinct from true;  -- else those without jobs stood in the way of others
      end loop;
      planned := planned[1:free];
      start_tags := start_tags[1:free];
      more := coalesce(more, false) or more_due;
      exit when planned is null;
      if suspect is null and planned && suspects then
        select id into suspect from unnest(planned) with ordinality c (id, place) where id = any (suspects) order by place limit 1;
        select array_agg(id order by place), array_agg(tag order by place) into planned, start_tags
          from unnest(planned, start_tags) with ordinality c (id, tag, place)
         where id = suspect or id <> all (suspects);
        avoided := avoided || suspects;
      end if;

      -- Claim them and charge their owners. Virtual time never runs backwards. Written as they are, the conditions
      -- on status keep the planner from reading an index of all waiting jobs for each, as it would while its statistics
      -- say that there are none.
      with locked as materialized (
        select p.id, p.user_id, p.attempt, p.file_path, p.options, q.id as queue_job_id, c.tag, c.place,
               case when p.attempt = 0 or p.retry_requested_at > p.started_at then p.estimated_seconds else 0 end as seconds
          from unnest(planned, start_tags) with ordinality c (id, tag, place)
          join public.processing_jobs p on p.id = c.id
          join procrastinate.procrastinate_jobs q on q.id = p.job_id::bigint
         where p.status || '' = 'queued' and q.status::text = 'todo'
           for update of p, q skip locked),
      clock as (
        update pgscribe.fair_queue set virtual_time = (select max(tag) from locked)
         where virtual_time < (select max(tag) from locked)),
      charged as (
        update pgscribe.owner_shares s set virtual_time = s.virtual_time + c.seconds / coalesce(w.weight, 1)
          from (select user_id, sum(seconds) as seconds from locked group by 1) c
          left join pgscribe.owner_limits w on w.owner_id = c.user_id
         where s.owner_id = c.user_id),
      moved as (
        update procrastinate.procrastinate_jobs q set status = 'doing', worker_id = worker
          from locked l where q.id = l.queue_job_id
        returning l.*, q.priority, q.args, q.attempts, q.task_name, q.queue_name)
      select array_agg(id), json_agg(json_build_object(
               'id', id, 'attempt', attempt + 1, 'user_id', user_id, 'file_path', file_path, 'options', options,
               'queue_job_id', queue_job_id, 'priority', priority, 'args', args, 'attempts', attempts,
               'task_name', task_name, 'queue_name', queue_name) order by place)
        into batch, batch_jobs from moved;
      claimed := claimed + coalesce(cardinality(batch), 0);
      free := wanted - claimed;
      jobs := case when jobs is null or batch is null then coalesce(jobs, batch_jobs)
        else (jobs::jsonb || batch_jobs::jsonb)::json end;
      if cardinality(batch) is distinct from cardinality(planned) then
        locked_ids := array(select unnest(planned) except select unnest(batch));
        missed := missed + cardinality(locked_ids);
        avoided := avoided || locked_ids;
      end if;
      exit when free = 0 or avoided = '{}' or rounds >= 8;
    end loop;
    held_back := suspects is not null and not coalesce(suspects <@ array[suspect], false);
  end;

  if next_due <= now() then
    next_due := (select min(p.due_at) from public.processing_jobs p where p.status = 'queued' and p.due_at > now());
  end if;
end $$;
comment on function pgscribe.claim_jobs is
  'Claims up to so many jobs for a worker, fairly between owners; none while the queue is paused. more: there are more to claim; missed: jobs that somebody else has locked; held_back: some that another worker may run at once; next_due: when one falls due.';

drop function pgscribe.turn;
create function pgscribe.turn(
  worker bigint, ended jsonb, wanted integer, running boolean, other_queues text[], default_max_attempts integer,
  announcement text, wanted_light integer default null, light_announcement text default null,
  out jobs json, out others json[], out more boolean, out missed integer,
  out due double precision, out due_in double precision, out busy uuid[], out abort bigint[],
  out light_more boolean, out light_due double precision, out light_due_in double precision, out light_busy bigint[])
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
declare
  attempts pgscribe.ended_attempt[];
  held uuid[];
  owners uuid[];
  corrections double precision[];
  lengths double precision[];
  claimed integer;
  held_back boolean;
  next_due timestamptz;
  deliveries json[];
  next_light timestamptz;
  light integer := coalesce(wanted_light, (wanted > 0)::integer);
begin
  if ended is not null then
    attempts := array(select x from jsonb_populate_recordset(null::pgscribe.ended_attempt, ended) x);
    if exists (select from unnest(attempts) x where x.job_id is null) then
      light_busy := pgscribe.busy_deliveries(array(select x.queue_job_id from unnest(attempts) x where x.job_id is null));
      if light_busy <> '{}' then
        attempts := array(select x from unnest(attempts) x where x.job_id is not null or x.queue_job_id <> all (light_busy));
      end if;
    end if;
    select e.held, e.owners, e.corrections, e.lengths into held, owners, corrections, lengths
      from pgscribe.end_attempts(worker, attempts, default_max_attempts) e;
    if cardinality(held) is distinct from cardinality(attempts) then
      select array_agg(p.id) into busy from unnest(attempts) x join public.processing_jobs p on p.id = x.job_id
       where p.attempt = x.attempt and p.status = 'processing' and p.id <> all (coalesce(held, '{}'));
    end if;
    -- Also where a stopping worker leaves a slot of an owner's to others.
    if exists (select from unnest(attempts) x where x.job_id is not null and (wanted = 0 or x.outcome in ('retry', 'released'))) then
      perform pgscribe.wake_workers();
    end if;
    if exists (select from unnest(attempts) x where x.job_id is null and (wanted_light = 0 or x.outcome in ('retry', 'released'))) then
      perform pgscribe.wake_couriers();
    end if;
    if 0 <> any (corrections) then
      perform pgscribe.correct_shares(owners, corrections, lengths);
    end if;
  end if;
  if wanted > 0 then
    select c.jobs, c.claimed, c.more, c.missed, c.held_back, c.next_due
      into jobs, claimed, more, missed, held_back, next_due
      from pgscribe.claim_jobs(worker, wanted, default_max_attempts) c;
    if wanted > claimed then
      due := extract(epoch from next_due);
      due_in := extract(epoch from next_due - clock_timestamp());
      if announcement is not null and not (more or held_back) then
        perform pg_notify('pgscribe_workers', announcement);
      end if;
    end if;
  end if;
  if light > 0 then
    next_light := (
      select min(coalesce(q.scheduled_at, '-infinity')) from procrastinate.procrastinate_jobs q
       where q.status in ('todo', 'aborting') and q.queue_name not in ('transcription', 'webhooks') and q.queue_name = any (other_queues));
    if next_light <= now() then
      others := pgscribe.claim_other_queue_jobs(worker, light, other_queues);
      next_light := (
        select min(coalesce(q.scheduled_at, '-infinity')) from procrastinate.procrastinate_jobs q
         where q.status in ('todo', 'aborting') and q.queue_name not in ('transcription', 'webhooks') and q.queue_name = any (other_queues)
           and coalesce(q.scheduled_at, '-infinity') > now());
    end if;
    light := light - coalesce(cardinality(others), 0);
    if wanted_light is null then  -- a worker of the version before: one of them, on top of its jobs
      due := least(due, extract(epoch from next_light));
      due_in := extract(epoch from to_timestamp(due) - clock_timestamp());
    else
      select c.jobs, least(next_light, c.next_due), c.more into deliveries, next_light, light_more
        from pgscribe.claim_deliveries(worker, light) c;
      others := others || deliveries;
      if light > cardinality(deliveries) then
        light_due := extract(epoch from next_light);
        light_due_in := extract(epoch from next_light - clock_timestamp());
        if light_announcement is not null and not light_more then
          perform pg_notify('pgscribe_workers', light_announcement);
        end if;
      end if;
    end if;
  end if;
  if running then
    abort := array(select q.id from procrastinate.procrastinate_jobs q
                    where q.worker_id = worker and q.status::text = 'doing' and q.abort_requested);
  end if;
end $$;
comment on function pgscribe.turn is
  'A worker''s turn, one transaction: ends attempts, claims jobs for the free slots, and light jobs (deliveries, maintenance) for theirs. busy, light_busy: attempts whose row somebody else has locked, to be ended later; abort: which of the running queue jobs are to stop; due, light_due: when a job falls due, and in how many seconds. The announcements go to the other workers if slots are left.';

create or replace function pgscribe.sweep_stalled_jobs(stall_timeout double precision, default_max_attempts integer) returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  dead bigint[];
  orphaned bigint[];
  busy bigint[];
  ended pgscribe.ended_attempt[];
  swept integer;
begin
  perform from pgscribe.fair_queue for update;  -- one sweeper at a time
  -- After a restart nobody could send a heartbeat: give everybody the time to do so.
  if pg_postmaster_start_time() > now() - make_interval(secs => stall_timeout) then
    return 0;
  end if;
  dead := array(select id from procrastinate.procrastinate_workers
                 where last_heartbeat < now() - make_interval(secs => stall_timeout));
  orphaned := array(
    select q.id from procrastinate.procrastinate_jobs q where q.worker_id = any (dead) and q.status::text = 'doing'
    union all
    select q.id from procrastinate.procrastinate_jobs q where q.worker_id is null and q.status = 'doing');
  select array_agg(row(q.id, p.id, p.attempt, 'retry', null, null, 'worker_lost',
           format('Worker %s ended, or was not heard of for %s s, during attempt %s.',
             coalesce(q.worker_id::text, '(unknown)'), stall_timeout, p.attempt), 0)::pgscribe.ended_attempt)
    into ended
    from procrastinate.procrastinate_jobs q join public.processing_jobs p on p.job_id = q.id::text
   where q.id = any (orphaned);
  select coalesce(cardinality(e.held), 0) into swept from pgscribe.end_attempts(null, coalesce(ended, '{}'), default_max_attempts) e;
  -- Queue jobs whose processing job was deleted, and those of another kind.
  delete from procrastinate.procrastinate_jobs q
   where q.id = any (orphaned) and q.queue_name = 'transcription' and q.status::text = 'doing'
     and not exists (select from public.processing_jobs p where p.job_id = q.id::text);
  busy := pgscribe.busy_deliveries(orphaned);
  with others as (
    select q.id, q.attempts, q.abort_requested, q.queue_name from procrastinate.procrastinate_jobs q
     where q.id = any (orphaned) and q.queue_name <> 'transcription' and q.status::text = 'doing' and q.id <> all (busy)
       for update skip locked)
  update procrastinate.procrastinate_jobs q set
      status = case when o.abort_requested then 'aborted'
        -- Deliveries have attempts of their own number.
        when o.attempts + 1 >= default_max_attempts and o.queue_name <> 'webhooks' then 'failed'
        else 'todo' end::procrastinate.procrastinate_job_status,
      attempts = o.attempts + 1, abort_requested = false, worker_id = null
    from others o where q.id = o.id;
  if found then
    perform pgscribe.wake_couriers();
  end if;
  delete from procrastinate.procrastinate_workers w
   where w.id = any (dead) and not exists (
     select from procrastinate.procrastinate_jobs q where q.worker_id = w.id and q.status::text = 'doing');
  if swept > 0 then
    perform pgscribe.wake_workers();
  end if;
  return swept;
end $$;

create or replace function pgscribe.prune(what text, older_than interval, batch integer) returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off as $$
declare
  cutoff timestamptz := now() - older_than;
  since timestamptz;
  ids uuid[];
  reached timestamptz;
  pruned integer;
begin
  select pruned_until into since from pgscribe.retention where kind = what for update skip locked;
  if not found then  -- somebody else is at it
    return 0;
  end if;
  select array_agg(id), max(completed_at) into ids, reached from (
    select p.id, p.completed_at from public.processing_jobs p
     where p.completed_at >= since and p.completed_at < cutoff
       and case what when 'queue_jobs' then p.job_id is not null else p.status = what end
     order by p.completed_at limit batch for update of p skip locked) old;
  pruned := coalesce(cardinality(ids), 0);
  if what = 'queue_jobs' then
    delete from procrastinate.procrastinate_jobs q using public.processing_jobs p
     where p.id = any (ids) and q.id = p.job_id::bigint;
    delete from public.processing_job_chunks c where c.job_id = any (ids);
    delete from pgscribe.preparations r where r.job_id = any (ids);
    if pruned < batch then  -- those of another kind are few, and so are owners who are gone
      -- Before the lock, for which claims wait: it reads all queue jobs.
      delete from procrastinate.procrastinate_jobs q
       where q.queue_name not in ('transcription', 'webhooks') and q.status not in ('todo', 'doing') and not exists (
         select from procrastinate.procrastinate_events e where e.job_id = q.id and e.at >= cutoff);
      perform from pgscribe.fair_queue for update;
      delete from pgscribe.owner_shares s where not exists (select from auth.users u where u.id = s.owner_id);
      delete from pgscribe.owner_queues k where not exists (select from auth.users u where u.id = k.owner_id);
      delete from pgscribe.owner_usage o where not exists (select from auth.users u where u.id = o.owner_id);
    end if;
  else
    delete from public.processing_jobs p where p.id = any (ids);
  end if;
  -- An hour's overlap, for transactions that began before the cutoff and ended after this one.
  update pgscribe.retention set pruned_until =
      case pruned when batch then reached else greatest(since, cutoff - interval '1 hour') end
   where kind = what;
  return pruned;
end $$;

revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
grant execute on function pgscribe.search_document(uuid, jsonb) to authenticated, service_role;
