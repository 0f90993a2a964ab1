-- What a recording looks like, for players. Workers of the version before send no peaks; nothing else changes for them.

create table public.processing_job_waveforms (
  job_id uuid primary key references public.processing_jobs (id) on delete cascade,
  peaks smallint[] not null
    check (cardinality(peaks) between 1 and 2000 and 0 <= all (peaks) and 255 >= all (peaks) and array_position(peaks, null) is null)
);
comment on table public.processing_job_waveforms is 'What the recordings of jobs look like, once their audio has been prepared.';
comment on column public.processing_job_waveforms.job_id is 'The job.';
comment on column public.processing_job_waveforms.peaks is
  'The largest absolute sample of each of as many equal shares of the recording, 0 to 255: the format''s full range.';

alter table public.processing_job_waveforms enable row level security;
create policy "Owners see the waveforms of their jobs" on public.processing_job_waveforms
  for select to authenticated
  using (exists (select from public.processing_jobs p where p.id = processing_job_waveforms.job_id and p.user_id = (select auth.uid())));
revoke all on public.processing_job_waveforms from public, anon, authenticated, service_role;
grant select on public.processing_job_waveforms to authenticated, service_role;

create or replace function pgscribe.store_plan(
  job uuid, attempt integer, call text, plan jsonb, cpu_seconds double precision, gpu_seconds double precision)
returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  stored pgscribe.preparations;
  heights smallint[] := array(
    select e.value::smallint from jsonb_array_elements_text(store_plan.plan -> 'peaks') with ordinality e (value, place) order by e.place);
begin
  if not pgscribe.hold_attempt(job, attempt) then
    return false;
  end if;
  select * into stored from pgscribe.preparations r where r.job_id = job and r.call_id = call;
  if stored.job_id is null then  -- it was stored already, and the answer got lost
    return true;
  end if;
  insert into pgscribe.stray_audio (audio) select stored.audio where stored.audio <> store_plan.plan ->> 'pcm' on conflict do nothing;
  update pgscribe.preparations r set call_id = null, plan = store_plan.plan - 'peaks', audio = store_plan.plan ->> 'pcm',
         cpu_seconds = r.cpu_seconds + store_plan.cpu_seconds, gpu_seconds = r.gpu_seconds + store_plan.gpu_seconds,
         refusal = pgscribe.refuse_plan(job, (store_plan.plan ->> 'duration')::float8)
   where r.job_id = job;
  -- After a second preparation the finished chunks stay as long as they are the same spans.
  delete from public.processing_job_chunks c where c.job_id = job and not exists (
    select from jsonb_array_elements(store_plan.plan -> 'spans') with ordinality s (span, place)
     where s.place - 1 = c.index and c.start_seconds = (s.span ->> 'start')::float8 / 16000
       and c.end_seconds = (s.span ->> 'end')::float8 / 16000);
  insert into public.processing_job_chunks (job_id, index, start_seconds, end_seconds)
  select job, s.place - 1, (s.span ->> 'start')::float8 / 16000, (s.span ->> 'end')::float8 / 16000
    from jsonb_array_elements(store_plan.plan -> 'spans') with ordinality s (span, place)
  on conflict do nothing;
  insert into public.processing_job_waveforms (job_id, peaks) select job, heights where cardinality(heights) > 0
  on conflict (job_id) do update set peaks = excluded.peaks;
  update public.processing_jobs p set audio_seconds = (store_plan.plan ->> 'duration')::float8, updated_at = now() where p.id = job;
  return true;
end $$;
comment on function pgscribe.store_plan(uuid, integer, text, jsonb, double precision, double precision) is
  'Stores what a preparation''s call returned: the spans become chunks, the peaks a waveform, the length is known from now on, and whether the owner may have so much. Doing it again changes nothing.';
