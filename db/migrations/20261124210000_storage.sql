-- Audio in Supabase Storage: a private bucket, in which users reach their own folder only.
--
-- The tables of `storage` come with the Storage server. Where they are not there yet, or may not be
-- changed from here, nothing happens; `pgscribe setup-storage` does the same again at any time.

create function pgscribe.set_up_storage(bucket text, out bucket_made boolean, out problem text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  own text;
  command text;
begin
  bucket_made := false;
  if to_regclass('storage.objects') is null or to_regclass('storage.buckets') is null
     or to_regprocedure('storage.foldername(text)') is null then
    problem := 'The database has no tables of Supabase Storage.';
    return;
  end if;
  begin
    insert into storage.buckets (id, name, public, allowed_mime_types)
    values (bucket, bucket, false, array['audio/*', 'video/*']) on conflict (id) do nothing;
    bucket_made := found;
  exception when insufficient_privilege or undefined_column then
    problem := 'The bucket can only be made through the Storage API.';
  end;
  -- Somebody else's, of the same name: whoever knows a path could read what lies there.
  if exists (select from storage.buckets b where b.id = bucket and to_jsonb(b) -> 'public' = 'true') then
    problem := format('The bucket %s is there and public; make it private, or name another one.', bucket);
    return;
  end if;
  own := format('bucket_id = %L and (storage.foldername(name))[1] = (select auth.uid())::text', bucket);
  foreach command in array array['select', 'insert', 'update', 'delete'] loop
    execute format('drop policy if exists %I on storage.objects', 'pgscribe audio: ' || command);
    execute format('create policy %I on storage.objects for %s to authenticated %s %s',
      'pgscribe audio: ' || command, command,
      case when command <> 'insert' then format('using (%s)', own) end,
      case when command in ('insert', 'update') then format('with check (%s)', own) end);
  end loop;
exception when insufficient_privilege then
  bucket_made := false;
  problem := format('%s may not make policies on storage.objects.', current_user);
end $$;
comment on function pgscribe.set_up_storage is
  'Makes the bucket for audio, private, and the policies by which users read, write and delete in the folder of their own id only. Says what could not be done; changes nothing where the policies can''t be made.';

create function pgscribe.storage_policies(bucket text) returns text[]
language sql stable set search_path = pg_catalog, pg_temp as $$
  select array(
    select lower(p.cmd) from pg_policies p
     where p.schemaname = 'storage' and p.tablename = 'objects'
       and p.policyname = 'pgscribe audio: ' || lower(p.cmd)
       and strpos(coalesce(p.qual, p.with_check), format('bucket_id = %L', bucket)) > 0
     order by 1)
$$;
comment on function pgscribe.storage_policies is
  'The commands for which the policies are there that set_up_storage makes, for this bucket.';

revoke execute on function pgscribe.set_up_storage(text) from public, anon, authenticated, service_role;
revoke execute on function pgscribe.storage_policies(text) from public, anon, authenticated, service_role;

select pgscribe.set_up_storage('audio');
