-- What the spans of jobs follow from. The functions are pgscribe's, in db/migrations.

-- job_trace --
select pgscribe.job_trace(%(job_id)s, %(attempt)s)
