-- Sessions of browsers. The functions are pgscribe's, in db/migrations.

-- create --
select pgscribe.create_web_session(
  %(id)s, %(user_id)s, %(sealed)s, make_interval(days => %(idle_days)s), make_interval(days => %(days)s), %(replaced)s)

-- use --
select pgscribe.use_web_session(%(id)s, make_interval(days => %(idle_days)s), make_interval(days => %(days)s))

-- lock --
select pgscribe.lock_web_session(%(id)s)

-- refresh --
select pgscribe.refresh_web_session(%(id)s, %(sealed)s)

-- end --
select pgscribe.end_web_session(%(id)s)
