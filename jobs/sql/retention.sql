-- What is kept how long. The functions are pgscribe's, in db/migrations.

-- prune --
select case %(what)s when 'webhook_deliveries' then pgscribe.prune_deliveries(make_interval(days => %(days)s), %(batch)s)
  else pgscribe.prune(%(what)s, make_interval(days => %(days)s), %(batch)s) end

-- expired_audio --
select paths, reached from pgscribe.expired_audio(make_interval(days => %(days)s), %(batch)s)

-- audio_to_delete --
select pgscribe.audio_to_delete(%(batch)s)

-- forget_deleted_audio --
select pgscribe.forget_deleted_audio(%(paths)s)

-- add_up_usage --
select pgscribe.add_up_usage()

-- audio_pruned --
select pgscribe.audio_pruned(%(reached)s)
