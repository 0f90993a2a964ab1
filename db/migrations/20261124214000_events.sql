-- Live: who looks on is told at once that a job has changed, and reads it as the one who may.
-- docs/decisions/0005-events.md says why.

-- Who looks on ---------------------------------------------------------------------------------------
-- A notification takes a lock that all committing transactions of the server share, so none is sent of jobs
-- whose owner nobody looks on for. Unlogged: after a crash there are no connections either, and whoever opens
-- one says anew what it wants.

create unlogged table pgscribe.event_hubs (
  id uuid primary key,
  seen_at timestamptz not null default now()
);
comment on table pgscribe.event_hubs is 'Web servers with streams of events. Those that have not been seen for a minute are gone.';
comment on column pgscribe.event_hubs.id is 'Picked by the web server when it starts.';
comment on column pgscribe.event_hubs.seen_at is 'When it was last heard of.';

create unlogged table pgscribe.watched_owners (
  owner_id uuid,
  hub_id uuid references pgscribe.event_hubs (id) on delete cascade,
  primary key (owner_id, hub_id)
);
create index watched_owners_hub_idx on pgscribe.watched_owners (hub_id);
comment on table pgscribe.watched_owners is 'Owners whose jobs somebody looks on at, by way of which web server.';
comment on column pgscribe.watched_owners.owner_id is 'The owner of the jobs.';
comment on column pgscribe.watched_owners.hub_id is 'The web server.';

create function pgscribe.watch(hub uuid, owners uuid[], complete boolean, echo_channel text, out now bigint)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  insert into pgscribe.event_hubs as h (id) values (hub)
  on conflict (id) do update set seen_at = pg_catalog.now() where h.seen_at < pg_catalog.now() - interval '1 second';
  if complete then
    delete from pgscribe.watched_owners w where w.hub_id = hub and w.owner_id <> all (owners);
    delete from pgscribe.event_hubs h where h.id in (
      select d.id from pgscribe.event_hubs d where d.seen_at < pg_catalog.now() - interval '1 minute' for update skip locked);
  end if;
  insert into pgscribe.watched_owners (owner_id, hub_id) select o, hub from unnest(owners) o on conflict do nothing;
  if echo_channel is not null then
    perform pg_notify(echo_channel, '');
  end if;
  watch.now := extract(epoch from clock_timestamp()) * 1000000;
end $$;
comment on function pgscribe.watch is
  'Says that a web server is alive and which owners'' jobs it looks on at: these as well, or, if complete, only these. Once it is committed, pgscribe_events is notified of changes to their jobs. Returns the time in microseconds.';

create function pgscribe.unwatch(hub uuid) returns void
language sql volatile set search_path = pg_catalog, pg_temp as $$
  delete from pgscribe.event_hubs h where h.id = hub
$$;
comment on function pgscribe.unwatch is 'Says that a web server has stopped.';

-- What is told ------------------------------------------------------------------------------------------

-- Ids only, and as a hint: anybody may send such a notification. A statement's jobs go together, as many as fit;
-- of very many it says nothing but whose they are.
create function pgscribe.announce_jobs() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if not exists (select from pgscribe.watched_owners) then
    return null;
  elsif not exists (select from changed n where exists (select from pgscribe.watched_owners w where w.owner_id = n.user_id)) then
    return null;
  end if;
  perform pg_notify('pgscribe_events', json_build_object('owner', m.user_id, 'jobs', m.jobs)::text)
    from (
      select c.user_id, case when c.total <= 600 then json_agg(c.id) end as jobs
        from (select n.id, n.user_id, count(*) over (partition by n.user_id) as total,
                     row_number() over (partition by n.user_id) as number
                from changed n
               where n.user_id in (
                 select w.owner_id from pgscribe.watched_owners w join pgscribe.event_hubs h on h.id = w.hub_id
                  where h.seen_at > now() - interval '1 minute')) c
       group by c.user_id, c.total, case when c.total <= 600 then (c.number - 1) / 150 end) m;
  return null;
end $$;
comment on function pgscribe.announce_jobs is
  'Notifies pgscribe_events of {"owner", "jobs"} for the jobs that a statement has inserted, updated or deleted; jobs is null where they are more than 600.';

create trigger announce_inserted after insert on public.processing_jobs
  referencing new table as changed for each statement execute function pgscribe.announce_jobs();
create trigger announce_updated after update on public.processing_jobs
  referencing new table as changed for each statement execute function pgscribe.announce_jobs();
create trigger announce_deleted after delete on public.processing_jobs
  referencing old table as changed for each statement execute function pgscribe.announce_jobs();

-- What is read -------------------------------------------------------------------------------------------

-- Every look is made as the user who gets to see it, with that user's own claims: row level security decides, and no
-- notification can show anybody what they may not read. Many users' looks are one call.
create function pgscribe.look(lookups jsonb, out now bigint, out answers json)
language plpgsql volatile set search_path = pg_catalog, pg_temp set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
declare
  lookup jsonb;
  ids uuid[];
  running uuid[];
  newest uuid[];
  jobs json;
  texts json;
  each json[] := '{}';
begin
  look.now := extract(epoch from clock_timestamp()) * 1000000;
  for lookup in select * from jsonb_array_elements(lookups) loop
    perform set_config('role', 'authenticated', true), set_config('request.jwt.claims', lookup ->> 'claims', true);
    running := '{}';
    newest := '{}';
    if (lookup -> 'list')::boolean then
      running := array(select p.id from public.processing_jobs p
                        where p.user_id = (lookup ->> 'owner')::uuid and p.status = 'processing' limit 100);
      newest := array(select p.id from public.processing_jobs p
                       where p.user_id = (lookup ->> 'owner')::uuid order by p.created_at desc, p.id desc limit 100);
    end if;
    ids := array(select x::uuid from jsonb_array_elements_text(lookup -> 'jobs') x) || running || newest;
    select json_agg(j) into jobs from (
      select p.id, p.file_path, p.status, p.progress, p.attempt, p.audio_seconds, p.note, p.error_code, p.error,
             p.created_at, p.updated_at, p.started_at, p.completed_at, p.due_at,
             (extract(epoch from p.completed_at) * 1000000)::bigint as ended
        from public.processing_jobs p where p.id = any (ids) order by p.created_at desc, p.id desc) j;
    texts := null;
    if jsonb_array_length(lookup -> 'texts') > 0 then
      -- Only what has not been read yet. mark says that what has been is still the same.
      select json_agg(json_build_object('job', t.job, 'ready', t.ready, 'chunks', t.chunks, 'mark', t.mark, 'since', t.since, 'text', (
          -- As public.partial_transcript, with what stands between two chunks before each of them.
          select string_agg(case when (select p.options ->> 'task' from public.processing_jobs p where p.id = t.job) = 'translate'
                   or coalesce(s.result ->> 'language', '') not in ('ja', 'lo', 'my', 'th', 'yue', 'zh') then ' ' else '' end
                   || (s.result ->> 'text'), '' order by s.index)
            from public.processing_job_chunks s
           where s.job_id = t.job and s.index >= t.since and s.index < t.ready and s.result ->> 'text' <> ''))) into texts
        from (
          select r.job, r.ready, r.chunks, r.mark,
                 case when r.ready >= r.known and r.known_mark is not distinct from r.given_mark then r.known else 0 end as since
            from (
              select (x ->> 'job')::uuid as job, (x ->> 'known')::integer as known, x ->> 'mark' as given_mark, c.ready, c.chunks,
                     (select max(m.completed_at)::text from public.processing_job_chunks m
                       where m.job_id = (x ->> 'job')::uuid and m.index < (x ->> 'known')::integer) as known_mark,
                     (select max(m.completed_at)::text from public.processing_job_chunks m
                       where m.job_id = (x ->> 'job')::uuid and m.index < c.ready) as mark
                from jsonb_array_elements(lookup -> 'texts') x cross join lateral (
                  select coalesce(min(o.index) filter (where o.completed_at is null), count(*))::integer as ready, count(*)::integer as chunks
                    from public.processing_job_chunks o where o.job_id = (x ->> 'job')::uuid) c) r) t;
    end if;
    each := each || json_build_object('running', running, 'jobs', jobs, 'texts', texts);
  end loop;
  answers := array_to_json(each);
end $$;
comment on function pgscribe.look is
  'Reads jobs and their partial text for several users, as each of them: {"claims", "owner", "jobs": ids, "list": also what runs and the newest 100, "texts": [{"job", "known": chunks, "mark"}]}. Returns an answer for each, in order, and the time in microseconds before it looked.';

-- Whose they are is all that this reads; what is shown of them, look reads.
create function pgscribe.ended_since(owners uuid[], since bigint, most integer, out found json)
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_object_agg(e.user_id, e.jobs) from (
    select p.user_id, case when count(*) <= most then json_agg(p.id) end as jobs
      from public.processing_jobs p
     where p.completed_at >= to_timestamp(since / 1000000.0) and p.user_id = any (owners)
     group by p.user_id) e
$$;
comment on function pgscribe.ended_since is
  'Ids of these owners'' jobs that ended since a time in microseconds, by owner; null for an owner with more than most.';

revoke all on pgscribe.event_hubs, pgscribe.watched_owners from public, anon, authenticated, service_role;
revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
-- An index's expression runs as whoever changes the row, be it to cancel a job that has completed.
grant execute on function pgscribe.search_document(uuid, jsonb) to authenticated, service_role;
