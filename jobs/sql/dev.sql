-- For the embedded environment, which has no Supabase Auth.

-- create_user --
insert into auth.users (id, aud, role, email) values (%(id)s, 'authenticated', 'authenticated', %(email)s)
on conflict (id) do nothing
