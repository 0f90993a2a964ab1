-- Runs before each of procrastinate's migrations, in its transaction: their names are unqualified.
create schema if not exists procrastinate;
comment on schema procrastinate is 'The queue, made by procrastinate''s own migrations. Not exposed: no API role has access.';
set local search_path = procrastinate;
