-- API keys. Only their hashes are known here.

-- use --
select id, bound_to, scopes, requests_per_minute, user_exists
  from pgscribe.use_api_key(%(hash)s, %(stated_user)s) where id is not null

-- create --
insert into pgscribe.api_keys (id, name, prefix, hash, user_id, scopes, requests_per_minute, expires_at)
values (%(id)s, %(name)s, %(prefix)s, %(hash)s, %(user_id)s, %(scopes)s, %(requests_per_minute)s, now() + %(lifetime)s)
returning id, name, prefix, user_id, scopes, requests_per_minute, created_at, expires_at, revoked_at, last_used_at,
  'usable' as state

-- list --
select id, name, prefix, user_id, scopes, requests_per_minute, created_at, expires_at, revoked_at, last_used_at,
       case when revoked_at is not null then 'revoked' when expires_at <= now() then 'expired' else 'usable' end as state
  from pgscribe.api_keys order by created_at, id

-- revoke --
update pgscribe.api_keys set revoked_at = coalesce(revoked_at, now()) where id = %(id)s
returning id
