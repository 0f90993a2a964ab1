-- Retention found the few queue jobs of maintenance by reading all queue jobs, every ten minutes: of a million, 0.3 s.

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
      -- Ranges, since no index finds what a name is not: all queues but 'transcription' and 'webhooks'.
      delete from procrastinate.procrastinate_jobs q
       where (q.queue_name < 'transcription' or q.queue_name > 'transcription' and q.queue_name < 'webhooks' or q.queue_name > 'webhooks')
         and q.status not in ('todo', 'doing') and not exists (
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
