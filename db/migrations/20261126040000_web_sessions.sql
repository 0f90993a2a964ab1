-- Sessions of browsers that use the web app. Whoever reads them here can't use them: the tokens are
-- encrypted with a key that follows from the browser's cookie, which is stored nowhere.

create table pgscribe.web_sessions (
  id bytea primary key check (octet_length(id) = 32),
  user_id uuid not null references auth.users (id) on delete cascade,
  created_at timestamptz not null default now(),
  last_seen_at timestamptz not null default now(),
  expires_at timestamptz not null,
  tokens bytea not null check (octet_length(tokens) between 1 and 65536)
);
comment on table pgscribe.web_sessions is
  'Sessions of browsers. The web server makes and ends them; no API role has access.';
comment on column pgscribe.web_sessions.id is
  'SHA-256 of the cookie''s 256 random bits, with a label of its own. The cookie does not follow from it.';
comment on column pgscribe.web_sessions.user_id is 'Who has signed in.';
comment on column pgscribe.web_sessions.created_at is 'When they signed in.';
comment on column pgscribe.web_sessions.last_seen_at is 'When the session was last used, to five minutes.';
comment on column pgscribe.web_sessions.expires_at is
  'From when on it is refused: some days after it was last used, and at the latest some weeks after the user signed in.';
comment on column pgscribe.web_sessions.tokens is
  'Access and refresh token, by AES-256-GCM with a key that HKDF makes of the cookie; the id is authenticated with them.';
create index web_sessions_user_idx on pgscribe.web_sessions (user_id);
create index web_sessions_expiry_idx on pgscribe.web_sessions (expires_at);

create function pgscribe.create_web_session(
  session_id bytea, owner uuid, sealed bytea, idle interval, lifetime interval, replaced bytea)
returns void language sql volatile set search_path = pg_catalog, pg_temp as $$
  delete from pgscribe.web_sessions where id = replaced;
  delete from pgscribe.web_sessions where id in (
    select id from pgscribe.web_sessions where expires_at <= now() order by expires_at limit 100 for update skip locked);
  insert into pgscribe.web_sessions (id, user_id, tokens, expires_at)
  values (session_id, owner, sealed, now() + least(idle, lifetime));
$$;
comment on function pgscribe.create_web_session is
  'Begins a session in place of the one that the browser had. Each time up to 100 expired ones are deleted, so they do not pile up.';

create function pgscribe.use_web_session(session_id bytea, idle interval, lifetime interval)
returns bytea language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
  sealed bytea;
begin
  select s.tokens into sealed from pgscribe.web_sessions s where s.id = session_id and s.expires_at > now();
  -- A database that has run full is read-only, and so is a replica; sessions are good there too.
  if found and current_setting('transaction_read_only') = 'off' then
    update pgscribe.web_sessions s
       set last_seen_at = now(), expires_at = least(now() + idle, s.created_at + lifetime)
     where s.id = (
       select l.id from pgscribe.web_sessions l
        where l.id = session_id and l.last_seen_at < now() - interval '5 minutes'
          for update skip locked);
  end if;
  return sealed;
end $$;
comment on function pgscribe.use_web_session is
  'Returns a session''s encrypted tokens, or null unless it is good, and puts off its end. Notes its use every five minutes, so that few requests write.';

create function pgscribe.lock_web_session(session_id bytea)
returns bytea language sql volatile
set search_path = pg_catalog, pg_temp set lock_timeout = '6s' as $$
  select s.tokens from pgscribe.web_sessions s where s.id = session_id and s.expires_at > now() for update
$$;
comment on function pgscribe.lock_web_session is
  'Returns a session''s encrypted tokens as use_web_session does, once no other transaction refreshes them; until this one ends none does. Waits for 6 s at most.';

create function pgscribe.refresh_web_session(session_id bytea, sealed bytea)
returns void language sql volatile set search_path = pg_catalog, pg_temp as $$
  update pgscribe.web_sessions set tokens = sealed where id = session_id
$$;
comment on function pgscribe.refresh_web_session is 'Replaces the encrypted tokens of a session.';

create function pgscribe.end_web_session(session_id bytea)
returns bytea language sql volatile
set search_path = pg_catalog, pg_temp set lock_timeout = '10s' as $$
  delete from pgscribe.web_sessions where id = session_id returning tokens
$$;
comment on function pgscribe.end_web_session is
  'Ends a session at once, on all servers, and returns its encrypted tokens; null if there is none.';

revoke all on pgscribe.web_sessions from public, anon, authenticated, service_role;
revoke execute on function
  pgscribe.create_web_session, pgscribe.use_web_session, pgscribe.lock_web_session,
  pgscribe.refresh_web_session, pgscribe.end_web_session
  from public, anon, authenticated, service_role;
