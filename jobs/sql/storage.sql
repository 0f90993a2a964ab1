-- The bucket's policies. The functions are pgscribe's, in db/migrations.

-- set_up_storage --
select bucket_made, problem from pgscribe.set_up_storage(%(bucket)s)

-- storage_policies --
select pgscribe.storage_policies(%(bucket)s)
