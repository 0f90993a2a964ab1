-- For the embedded environment, which has no Supabase Auth.

-- create_user --
insert into auth.users (id, aud, role, email) values (%(id)s, 'authenticated', 'authenticated', %(email)s)
on conflict (id) do nothing

-- user_of_email --
with made as (
  insert into auth.users (id, aud, role, email, email_confirmed_at, created_at)
  values (gen_random_uuid(), 'authenticated', 'authenticated', %(email)s, now(), now())
  on conflict (email) where not is_sso_user do nothing
  returning id)
select id from made union all select id from auth.users where email = %(email)s and not is_sso_user

-- embedded --
-- Only whoever starts the server sets cluster_name; it is `main` on hosted projects.
select current_setting('cluster_name') ~ '^pgscribe-[0-9a-f]{16}$' and inet_server_addr() <<= '127.0.0.0/8'
