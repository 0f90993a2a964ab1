-- The queue, continued: claims look past rows that somebody else has locked, and jobs that may have killed
-- their workers run apart. docs/decisions/0002-queue.md says why.

-- Jobs whose last attempt lost its worker: none, most of the time.
create index processing_jobs_worker_lost_idx on public.processing_jobs (status)
  where error_code = 'worker_lost' and status in ('queued', 'processing');

create or replace function pgscribe.check_file_path(file_path text) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  if file_path ~ '^[a-z]+://' then
    perform pgscribe.reject('file_path', 'is a URL', 'Put the audio in storage and give its path there.');
  elsif length(file_path) not between 1 and 1024
      or file_path ~ '(^|/)\.{0,2}(/|$)'  -- an empty, "." or ".." part; a slash at either end
      or file_path ~ '[[:cntrl:]\\]' then
    perform pgscribe.reject('file_path', 'must be a relative path of 1 to 1024 characters without "..", empty parts, backslashes or control characters',
      'Use the path that the upload returned, such as <user_id>/<name>.mp3.');
  elsif octet_length(file_path) > 255
      and exists (select from string_to_table(file_path, '/') part where octet_length(part) > 255) then
    perform pgscribe.reject('file_path', 'has a part of more than 255 bytes, which no file system can store',
      'Use the path that the upload returned, such as <user_id>/<name>.mp3.');
  end if;
end $$;

drop function pgscribe.claim_jobs;
create function pgscribe.claim_jobs(
  worker bigint, wanted integer, default_max_attempts integer default 3, other_queues text[] default '{}',
  out jobs json, out claimed integer, out more boolean, out missed integer, out held_back boolean,
  out others json[], out next_due timestamptz)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  now_serving double precision;
  default_max_running integer;
  paused boolean;
  next_other timestamptz;
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
         exists (select from public.processing_jobs l where l.error_code = 'worker_lost' and l.status in ('queued', 'processing')),
         (select min(coalesce(q.scheduled_at, '-infinity')) from procrastinate.procrastinate_jobs q
           where q.status in ('todo', 'aborting') and q.queue_name <> 'transcription' and q.queue_name = any (other_queues))
    into now_serving, default_max_running, paused, next_due, any_news, any_lost, next_other
    from pgscribe.fair_queue f cross join pgscribe.queue_settings s
   where s.queue_name = 'transcription' for update of f;
  -- One of another kind goes first, or retention would wait for as long as all slots are taken.
  if next_other <= now() then
    others := pgscribe.claim_other_queue_jobs(worker, 1, other_queues);
    wanted := wanted - cardinality(others);
  end if;
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
  if free > 0 and next_other <= now() then
    others := others || pgscribe.claim_other_queue_jobs(worker, free, other_queues);
    next_other := (
      select min(coalesce(q.scheduled_at, '-infinity')) from procrastinate.procrastinate_jobs q
       where q.status in ('todo', 'aborting') and q.queue_name <> 'transcription' and q.queue_name = any (other_queues)
         and coalesce(q.scheduled_at, '-infinity') > now());
  end if;
  next_due := least(next_due, next_other);
end $$;
comment on function pgscribe.claim_jobs is
  'Claims up to so many jobs for a worker, fairly between owners; none while the queue is paused. more: there are more to claim; missed: jobs that somebody else has locked; held_back: some that another worker may run at once; others: queue jobs of another kind; next_due: when something falls due.';

create or replace function pgscribe.turn(
  worker bigint, ended jsonb, wanted integer, running boolean, other_queues text[], default_max_attempts integer,
  announcement text,
  out jobs json, out others json[], out more boolean, out missed integer,
  out due double precision, out due_in double precision, out busy uuid[], out abort bigint[])
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
begin
  if ended is not null then
    attempts := array(select x from jsonb_populate_recordset(null::pgscribe.ended_attempt, ended) x);
    select e.held, e.owners, e.corrections, e.lengths into held, owners, corrections, lengths
      from pgscribe.end_attempts(worker, attempts, default_max_attempts) e;
    if cardinality(held) is distinct from cardinality(attempts) then
      select array_agg(p.id) into busy from unnest(attempts) x join public.processing_jobs p on p.id = x.job_id
       where p.attempt = x.attempt and p.status = 'processing' and p.id <> all (coalesce(held, '{}'));
    end if;
    -- Also where a stopping worker leaves a slot of an owner's to others.
    if wanted = 0 or exists (select from unnest(attempts) x where x.outcome in ('retry', 'released')) then
      perform pgscribe.wake_workers();
    end if;
    if 0 <> any (corrections) then
      perform pgscribe.correct_shares(owners, corrections, lengths);
    end if;
  end if;
  if wanted > 0 then
    select c.jobs, c.claimed + coalesce(cardinality(c.others), 0), c.more, c.missed, c.held_back, c.others, c.next_due
      into jobs, claimed, more, missed, held_back, others, next_due
      from pgscribe.claim_jobs(worker, wanted, default_max_attempts, other_queues) c;
    if wanted > claimed then
      due := extract(epoch from next_due);
      due_in := extract(epoch from next_due - clock_timestamp());
      if announcement is not null and not (more or held_back) then
        perform pg_notify('pgscribe_workers', announcement);
      end if;
    end if;
  end if;
  if running then
    abort := array(select q.id from procrastinate.procrastinate_jobs q
                    where q.worker_id = worker and q.status::text = 'doing' and q.abort_requested);
  end if;
end $$;

revoke execute on function pgscribe.claim_jobs from public, anon, authenticated, service_role;
