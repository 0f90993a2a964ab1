-- What an application finds in the database of a hosted Supabase project (November 2026):
-- roles, schemas, privileges, auth.users and the auth functions. Tables of the Storage and
-- Realtime servers come with those servers and are not made here.
--
-- Run as the superuser `supabase_admin`, in one transaction, in each database that needs it. It
-- adds what is missing and may run again at any time: what a migration may have changed since
-- (settings of roles, privileges in `public`, default privileges) is left as it is. The session
-- setting `pgscribe.password` is the password for login roles that have none yet.

-- Roles belong to all databases of a server: one bootstrap at a time.
lock table pg_catalog.pg_authid in share row exclusive mode;

do $$
declare
  wanted record;
  setting text;
begin
  for wanted in
    select *
    from (values
      ('postgres', 'login createdb createrole replication bypassrls',
        array['search_path = "$user", public, extensions']),
      ('anon', 'nologin', array['statement_timeout = ''3s''']),
      ('authenticated', 'nologin', array['statement_timeout = ''8s''']),
      ('service_role', 'nologin bypassrls', '{}'),
      ('authenticator', 'login noinherit',
        array['statement_timeout = ''8s''', 'lock_timeout = ''8s''']),
      ('supabase_auth_admin', 'login noinherit',
        array['search_path = auth', 'idle_in_transaction_session_timeout = 60000']),
      ('supabase_storage_admin', 'login noinherit createrole', array['search_path = storage']),
      ('supabase_realtime_admin', 'login noinherit createrole replication',
        array['search_path = realtime']),
      ('supabase_read_only_user', 'login bypassrls', '{}'),
      ('dashboard_user', 'nologin createdb createrole replication', '{}')
    ) as hosted (name, attributes, settings)
    where not exists (select from pg_roles where rolname = hosted.name)
  loop
    execute format('create role %I with %s', wanted.name, wanted.attributes);
    foreach setting in array wanted.settings loop
      execute format('alter role %I set %s', wanted.name, setting);
    end loop;
  end loop;

  for wanted in
    select rolname as name
    from pg_authid
    where rolcanlogin and rolpassword is null
      and nullif(current_setting('pgscribe.password', true), '') is not null
  loop
    execute format('alter role %I password %L', wanted.name, current_setting('pgscribe.password'));
  end loop;
end $$;

grant anon, authenticated, service_role to authenticator, supabase_realtime_admin;
grant anon, authenticated, service_role to postgres with admin option;
grant pg_monitor, pg_read_all_data, pg_signal_backend to postgres with admin option;
grant pg_create_subscription to postgres;
grant pg_read_all_data to supabase_read_only_user;
grant authenticator to supabase_storage_admin;

do $$
begin
  execute format('alter database %I owner to postgres', current_database());
  execute format('grant all on database %I to dashboard_user', current_database());
  execute format(
    'grant create on database %I to supabase_auth_admin, supabase_storage_admin, supabase_realtime_admin',
    current_database());
end $$;

-- New objects of `postgres` in `public`: projects made since 30 October 2026 grant the API roles no
-- DML. What is left of the former `grant all` is listed here, and functions stay executable
-- through PUBLIC.
do $$
begin
  if not exists (
    select
    from pg_default_acl
    where defaclrole = 'postgres'::regrole and defaclnamespace = 'public'::regnamespace
  ) then
    grant usage on schema public to postgres, anon, authenticated, service_role;
    alter default privileges for role postgres in schema public
      grant truncate, references, trigger, maintain on tables
      to anon, authenticated, service_role;
    alter default privileges for role postgres in schema public
      grant update on sequences to anon, authenticated, service_role;
  end if;
end $$;

create schema if not exists extensions;
grant usage on schema extensions to anon, authenticated, service_role;
grant all on schema extensions to postgres, dashboard_user;

-- The wheel brings neither uuid-ossp nor pgcrypto; this is the one function of theirs in wide use.
do $$
begin
  if to_regprocedure('extensions.uuid_generate_v4()') is null then
    create function extensions.uuid_generate_v4() returns uuid
      language sql volatile parallel safe
      return pg_catalog.gen_random_uuid();
  end if;
end $$;

create schema if not exists auth authorization supabase_admin;
grant usage on schema auth to anon, authenticated, service_role, postgres, supabase_realtime_admin;
grant all on schema auth to supabase_auth_admin, dashboard_user;
alter default privileges for role supabase_auth_admin in schema auth
  grant all on tables to postgres, dashboard_user;
alter default privileges for role supabase_auth_admin in schema auth
  grant all on sequences to postgres, dashboard_user;
alter default privileges for role supabase_auth_admin in schema auth
  grant all on functions to postgres, dashboard_user;

create table if not exists auth.users (
  instance_id uuid,
  id uuid primary key,
  aud varchar(255),
  role varchar(255),
  email varchar(255),
  encrypted_password varchar(255),
  email_confirmed_at timestamptz,
  invited_at timestamptz,
  confirmation_token varchar(255),
  confirmation_sent_at timestamptz,
  recovery_token varchar(255),
  recovery_sent_at timestamptz,
  email_change_token_new varchar(255),
  email_change varchar(255),
  email_change_sent_at timestamptz,
  last_sign_in_at timestamptz,
  raw_app_meta_data jsonb,
  raw_user_meta_data jsonb,
  is_super_admin boolean,
  created_at timestamptz,
  updated_at timestamptz,
  phone text unique,
  phone_confirmed_at timestamptz,
  phone_change text default '',
  phone_change_token varchar(255) default '',
  phone_change_sent_at timestamptz,
  confirmed_at timestamptz
    generated always as (least(email_confirmed_at, phone_confirmed_at)) stored,
  email_change_token_current varchar(255) default '',
  email_change_confirm_status smallint default 0
    check (email_change_confirm_status between 0 and 2),
  banned_until timestamptz,
  reauthentication_token varchar(255) default '',
  reauthentication_sent_at timestamptz,
  is_sso_user boolean not null default false,
  deleted_at timestamptz,
  is_anonymous boolean not null default false
);
comment on table auth.users is 'Auth: Stores user login data within a secure schema.';
create unique index if not exists users_email_partial_key
  on auth.users (email) where not is_sso_user;
alter table auth.users enable row level security;
alter table auth.users owner to supabase_auth_admin;
grant all on auth.users to dashboard_user;
grant select, insert, update, delete, references, trigger, truncate
  on auth.users to postgres with grant option;

create or replace function auth.uid() returns uuid language sql stable as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
  )::uuid
$$;
create or replace function auth.role() returns text language sql stable as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.role', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'role'
  )
$$;
create or replace function auth.email() returns text language sql stable as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.email', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'email'
  )
$$;
create or replace function auth.jwt() returns jsonb language sql stable as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')
  )::jsonb
$$;
alter function auth.uid() owner to supabase_auth_admin;
alter function auth.role() owner to supabase_auth_admin;
alter function auth.email() owner to supabase_auth_admin;
alter function auth.jwt() owner to supabase_auth_admin;

create schema if not exists storage authorization supabase_admin;
grant usage on schema storage to anon, authenticated, service_role;
grant usage on schema storage to postgres with grant option;
grant all on schema storage to supabase_storage_admin with grant option;
grant all on schema storage to dashboard_user;
alter default privileges for role supabase_storage_admin in schema storage
  grant all on tables to postgres, anon, authenticated, service_role;
alter default privileges for role supabase_storage_admin in schema storage
  grant all on sequences to postgres, anon, authenticated, service_role;
alter default privileges for role supabase_storage_admin in schema storage
  grant all on functions to postgres, anon, authenticated, service_role;

create schema if not exists realtime authorization supabase_admin;
grant usage on schema realtime to anon, authenticated, service_role;
grant usage on schema realtime to postgres with grant option;
grant all on schema realtime to supabase_realtime_admin with grant option;

do $$
begin
  if not exists (select from pg_publication where pubname = 'supabase_realtime') then
    create publication supabase_realtime;
    alter publication supabase_realtime owner to postgres;
  end if;
end $$;
