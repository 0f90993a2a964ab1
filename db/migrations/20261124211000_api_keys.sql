-- API keys, with which services use the REST API. Nothing of them is stored but a hash.

create table pgscribe.api_keys (
  id uuid primary key,
  name text not null check (length(name) between 1 and 100),
  prefix text not null check (prefix ~ '^pgs_[0-9a-f]{8}$'),
  hash bytea not null unique check (octet_length(hash) = 32),
  user_id uuid references auth.users (id) on delete cascade,
  scopes text[] not null check (
    cardinality(scopes) > 0 and scopes <@ array['jobs:read', 'jobs:write', 'audio:read', 'audio:write']
    and array_position(scopes, null) is null),
  requests_per_minute integer check (requests_per_minute > 0),
  created_at timestamptz not null default now(),
  expires_at timestamptz,
  revoked_at timestamptz,
  last_used_at timestamptz
);
comment on table pgscribe.api_keys is 'API keys of services. Made and revoked with `pgscribe keys`; no API role has access.';
comment on column pgscribe.api_keys.id is 'The key''s id, which `pgscribe keys revoke` takes.';
comment on column pgscribe.api_keys.name is 'Whose key it is, or what for.';
comment on column pgscribe.api_keys.prefix is 'How the key begins, so that a key that was found can be recognised. No secret.';
comment on column pgscribe.api_keys.hash is
  'SHA-256 of the key. Its 256 random bits cannot be guessed, so a slow hash, as passwords need, would only cost each request its time.';
comment on column pgscribe.api_keys.user_id is 'The user whom the key acts for; null: a service''s key, whose requests each state their user.';
comment on column pgscribe.api_keys.scopes is 'What the key may be used for.';
comment on column pgscribe.api_keys.requests_per_minute is 'Requests a minute; null: the web server''s limit.';
comment on column pgscribe.api_keys.created_at is 'When the key was made.';
comment on column pgscribe.api_keys.expires_at is 'From when on the key is refused; null: never.';
comment on column pgscribe.api_keys.revoked_at is 'Since when the key is refused; null: it is not revoked.';
comment on column pgscribe.api_keys.last_used_at is 'When the key was last used, to the minute.';
create index api_keys_user_idx on pgscribe.api_keys (user_id);

create function pgscribe.use_api_key(
  key_hash bytea, stated_user uuid,
  out id uuid, out bound_to uuid, out scopes text[], out requests_per_minute integer, out user_exists boolean)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
  select k.id, k.user_id, k.scopes, k.requests_per_minute into id, bound_to, scopes, requests_per_minute
    from pgscribe.api_keys k
   where k.hash = key_hash and k.revoked_at is null and (k.expires_at is null or k.expires_at > now());
  if not found then
    return;
  end if;
  user_exists := exists (
    select from auth.users u where u.id = coalesce(bound_to, stated_user)
       and u.deleted_at is null and (u.banned_until is null or u.banned_until <= now()));
  -- A database that has run full is read-only, and so is a replica; keys are good there too.
  if current_setting('transaction_read_only') = 'off' then
    update pgscribe.api_keys k set last_used_at = now() where k.id = (
      select l.id from pgscribe.api_keys l where l.id = use_api_key.id
         and (l.last_used_at is null or l.last_used_at < now() - interval '1 minute')
         for update skip locked);
  end if;
end $$;
comment on function pgscribe.use_api_key is
  'Returns the key with that hash, unless it has expired or is revoked (then id is null), and whether the user whom it acts for exists and is not banned. Notes its use once a minute, so that few requests write.';

revoke all on pgscribe.api_keys from public, anon, authenticated, service_role;
revoke execute on function pgscribe.use_api_key from public, anon, authenticated, service_role;
