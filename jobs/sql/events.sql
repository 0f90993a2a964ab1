-- What a web server with streams of events says to the database. The functions are pgscribe's, in
-- db/migrations.

-- watch --
select now from pgscribe.watch(%(hub)s, %(owners)s, %(complete)s, %(echo_channel)s)

-- unwatch --
select pgscribe.unwatch(%(hub)s)

-- look --
select now, answers from pgscribe.look(%(lookups)s)

-- ended_since --
select found from pgscribe.ended_since(%(owners)s, %(since)s, %(most)s)
