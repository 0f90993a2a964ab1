-- What is kept how long. The functions are pgscribe's, in db/migrations.

-- prune --
select pgscribe.prune(%(what)s, make_interval(days => %(days)s), %(batch)s)

-- expired_audio --
select paths, reached from pgscribe.expired_audio(make_interval(days => %(days)s), %(batch)s)

-- audio_pruned --
select pgscribe.audio_pruned(%(reached)s)
