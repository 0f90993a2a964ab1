-- Passwords of the roles by which services reach the database, each its own, from the environment.
--
-- Run by psql as a superuser: once by the image, as it makes the database, and again after a
-- password has been renewed (docs/self-hosting.md).

\set ON_ERROR_STOP on
\set ECHO none
\set QUIET on

\getenv postgres_password POSTGRES_PASSWORD
\getenv authenticator_password AUTHENTICATOR_PASSWORD
\getenv auth_admin_password AUTH_ADMIN_PASSWORD
\getenv storage_admin_password STORAGE_ADMIN_PASSWORD

-- A statement that fails would be logged with the password in it.
set log_min_error_statement = panic;
set log_statement = 'none';
set client_min_messages = warning;

begin;
alter role postgres with password :'postgres_password';
alter role supabase_admin with password :'postgres_password';
alter role authenticator with password :'authenticator_password';
alter role supabase_auth_admin with password :'auth_admin_password';
alter role supabase_storage_admin with password :'storage_admin_password';

-- Where Realtime keeps its own tables.
create schema if not exists _realtime authorization supabase_admin;
commit;
