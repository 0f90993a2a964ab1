-- Webhooks: deliveries as a worker makes them, then what owners see and change. The functions are pgscribe's, in
-- db/migrations.

-- begin_delivery --
select pgscribe.begin_delivery(%(delivery)s)::jsonb
    || jsonb_build_object('trace', pgscribe.delivery_trace(%(delivery)s))

-- record_delivery --
select pgscribe.record_delivery(
  %(delivery)s, %(seconds)s, %(status)s, %(excerpt)s, %(error_code)s, %(error)s)

-- refuse_delivery --
select pgscribe.refuse_delivery(%(delivery)s, %(error_code)s, %(error)s)

-- list_endpoints --
select id, url, events, description, created_at, updated_at, disabled_at, disabled_reason
  from public.webhook_endpoints
 where user_id = auth.uid() and (%(id)s::uuid is null or id = %(id)s)
 order by created_at, id

-- create_endpoint --
select public.create_webhook_endpoint(%(url)s, %(events)s, %(description)s)

-- update_endpoint --
update public.webhook_endpoints set
    url = coalesce(%(url)s, url), events = coalesce(%(events)s, events),
    description = case when %(sets_description)s then %(description)s else description end,
    disabled_at = case %(enabled)s::boolean when true then null when false then now() else disabled_at end
 where id = %(id)s and user_id = auth.uid()

-- delete_endpoint --
delete from public.webhook_endpoints where id = %(id)s and user_id = auth.uid()

-- rotate_secret --
select public.rotate_webhook_secret(%(id)s, make_interval(secs => %(keep)s))

-- send_test --
select id from public.send_test_webhook(%(id)s)

-- list_deliveries --
select id, endpoint_id, job_id, url, event, status, attempts, created_at, due_at, completed_at, response_status, error_code, error
  from public.webhook_deliveries
 where user_id = auth.uid()
   and (%(endpoint)s::uuid is null or endpoint_id = %(endpoint)s) and (%(job)s::uuid is null or job_id = %(job)s)
   and (%(status)s::text is null or status = %(status)s)
   and (%(after_id)s::uuid is null or (created_at, id) < (%(after_at)s, %(after_id)s))
 order by created_at desc, id desc
 limit %(limit)s

-- get_delivery --
select d.id, d.endpoint_id, d.job_id, d.url, d.event, d.status, d.attempts, d.created_at, d.due_at, d.completed_at,
       d.response_status, d.error_code, d.error, d.payload,
       coalesce((select jsonb_agg(to_jsonb(a) - 'delivery_id' order by a.attempt) from public.webhook_attempts a
                  where a.delivery_id = d.id), '[]') as log
  from public.webhook_deliveries d
 where d.id = %(id)s and d.user_id = auth.uid()

-- replay_delivery --
select id from public.replay_webhook_delivery(%(id)s)

-- replay_deliveries --
select public.replay_webhook_deliveries(%(since)s, %(until)s, %(endpoint)s, %(status)s)

-- Everybody's, for the command line of whoever runs pgscribe. Straight on the database: nobody is asked who they are.

-- admin_has_user --
select exists (select from auth.users where id = %(user)s)

-- admin_list_endpoints --
select id, user_id, url, events, description, created_at, updated_at, disabled_at, disabled_reason
  from public.webhook_endpoints
 where (%(id)s::uuid is null or id = %(id)s) and (%(user)s::uuid is null or user_id = %(user)s)
 order by created_at, id

-- admin_create_endpoint --
select public.create_webhook_endpoint(%(url)s, %(events)s, %(description)s, %(user)s)

-- admin_enable_endpoint --
update public.webhook_endpoints set disabled_at = case when not %(enabled)s then now() end where id = %(id)s

-- admin_rotate_secret --
select pgscribe.new_webhook_secret(%(user)s, %(endpoint)s, make_interval(secs => %(keep)s))

-- admin_send_test --
select id from public.send_test_webhook(%(id)s)

-- admin_list_deliveries --
select d.id, d.user_id, d.endpoint_id, d.job_id, d.url, coalesce(d.url, e.url) as target, d.event, d.status, d.attempts,
       d.created_at, d.due_at, d.completed_at, d.response_status, d.error_code, d.error
  from public.webhook_deliveries d left join public.webhook_endpoints e on e.id = d.endpoint_id
 where (%(user)s::uuid is null or d.user_id = %(user)s) and (%(endpoint)s::uuid is null or d.endpoint_id = %(endpoint)s)
   and (%(status)s::text is null or d.status = %(status)s) and (d.endpoint_id is null or e.id is not null)
 order by d.created_at desc, d.id desc
 limit %(limit)s

-- admin_get_delivery --
select d.id, d.user_id, d.endpoint_id, d.job_id, d.url, coalesce(d.url, e.url) as target, d.event, d.status, d.attempts,
       d.created_at, d.due_at, d.completed_at, d.response_status, d.error_code, d.error, d.payload,
       coalesce((select jsonb_agg(to_jsonb(a) - 'delivery_id' order by a.attempt) from public.webhook_attempts a
                  where a.delivery_id = d.id), '[]') as log
  from public.webhook_deliveries d left join public.webhook_endpoints e on e.id = d.endpoint_id
 where d.id = %(id)s and (d.endpoint_id is null or e.id is not null)

-- admin_replay_delivery --
select pgscribe.replay_deliveries(array[d.id]) as replayed, case when e.disabled_at is not null then e.id end as disabled
  from public.webhook_deliveries d left join public.webhook_endpoints e on e.id = d.endpoint_id
 where d.id = %(id)s and (d.endpoint_id is null or e.id is not null)

-- admin_replay_failed --
with chosen as materialized (
  select array(
    select d.id from public.webhook_deliveries d
     where d.status = 'failed' and d.created_at >= %(since)s
       and (%(user)s::uuid is null or d.user_id = %(user)s) and (%(endpoint)s::uuid is null or d.endpoint_id = %(endpoint)s)
       and (%(before)s::timestamptz is null or d.completed_at < %(before)s)
       and (d.endpoint_id is null
            or exists (select from public.webhook_endpoints e where e.id = d.endpoint_id and e.disabled_at is null))
     order by d.created_at, d.id limit %(limit)s) as ids)
select cardinality(ids) as chosen, pgscribe.replay_deliveries(ids) as replayed, now() as at from chosen

-- admin_failed_at_disabled --
select e.id, count(*)
  from public.webhook_deliveries d join public.webhook_endpoints e on e.id = d.endpoint_id
 where d.status = 'failed' and d.created_at >= %(since)s and e.disabled_at is not null
   and (%(user)s::uuid is null or d.user_id = %(user)s) and (%(endpoint)s::uuid is null or d.endpoint_id = %(endpoint)s)
 group by e.id order by e.id
