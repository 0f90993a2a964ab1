-- Lists of one status, and full-text search over an owner's own transcripts. docs/limits.md says what it finds.

-- An owner's list of jobs that have ended in one way, newest first, however many others there are.
create index processing_jobs_status_idx on public.processing_jobs (user_id, status, created_at desc, id desc)
  where status in ('completed', 'failed', 'cancelled');

create function pgscribe.search_document(user_id uuid, result jsonb) returns tsvector
language plpgsql immutable parallel unsafe cost 10000 set search_path = pg_catalog, pg_temp as $$
declare
  owner tsvector := array_to_tsvector(array[' ' || user_id]);
  words text := coalesce(result ->> 'text', '');
begin
  -- A tsvector holds a megabyte. No text of 128 kB makes more, whatever is in it; hours of speech do not either.
  if octet_length(words) > 131072 then
    begin
      return owner || to_tsvector('simple', left(words, 1000000));
    exception when program_limit_exceeded then
      return owner || to_tsvector('simple', left(words, 32768));
    end;
  end if;
  return owner || to_tsvector('simple', words);
end $$;
comment on function pgscribe.search_document is
  'What a search looks into: the words of a transcript with their places and, as a word that begins as none does, its owner, so that nobody''s search reads others'' matches. Of a text with too many different words it has those of the beginning: it never fails.';

create index processing_jobs_search_idx on public.processing_jobs using gin (pgscribe.search_document(user_id, result))
  where status = 'completed' and result ->> 'text' <> '';

create function pgscribe.search_query(q text) returns tsquery
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  words tsquery := websearch_to_tsquery('simple', q);
begin
  -- Whoever types is perhaps not done with the last word, unless that is quoted or excluded.
  if q ~ '[[:alnum:]]{3}$' and q !~ '(^|[[:space:]])-[^[:space:]]*$' and q !~ '^[^"]*("[^"]*"[^"]*)*"[^"]*$' and words::text ~ '''$' then
    return (words::text || ':*')::tsquery;
  end if;
  return words;
end $$;
comment on function pgscribe.search_query is
  'The query of what somebody types: all words, "phrases", or, -excluded, and what begins with the last word if that has three letters.';

create function pgscribe.search_words(q text, query tsquery) returns tsquery
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select string_agg('''' || replace(replace(word, '\', '\\'), '''', '''''') || '''' ||
           case when query::text ~ ':\*$' and strpos(query::text, '''' || word || ''':*') > 0 then ':*' else '' end, ' | ')::tsquery
    from unnest(tsvector_to_array(to_tsvector('simple', q))) word
$$;
comment on function pgscribe.search_words is 'Any of the words of a query, to show where they are.';

create function pgscribe.search_hits(result jsonb, words tsquery) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(
    (select jsonb_agg(jsonb_build_object('start', h.segment -> 'start', 'end', h.segment -> 'end',
              'text', ts_headline('simple', h.plain, words, E'HighlightAll=true, StartSel=\x02, StopSel=\x03')) order by h.place)
       from (select s.segment, s.place, t.plain
               from jsonb_array_elements(case jsonb_typeof(result -> 'segments') when 'array' then result -> 'segments' else '[]' end)
                    with ordinality s (segment, place)
              cross join lateral (select translate(left(s.segment ->> 'text', 2000), E'\x02\x03', '')) t (plain)
              where to_tsvector('simple', t.plain) @@ words
              order by s.place limit 3) h),
    jsonb_build_array(jsonb_build_object('start', null, 'end', null, 'text',
      ts_headline('simple', translate(left(result ->> 'text', 20000), E'\x02\x03', ''), words,
        E'MaxFragments=1, MaxWords=30, MinWords=15, StartSel=\x02, StopSel=\x03'))))
$$;
comment on function pgscribe.search_hits is
  'Where words are in a transcript: up to three of its segments. Each hit stands between the control characters 2 and 3, which are nowhere else in the text.';

create function public.search_transcripts(
  q text, "limit" integer default 20, after_created_at timestamptz default null, after_id uuid default null)
returns table (id uuid, created_at timestamptz, file_path text, language text, audio_seconds double precision, hits jsonb)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp set enable_seqscan = off set jit = off set work_mem = '64MB' set plan_cache_mode = force_custom_plan as $$
declare
  owner uuid := auth.uid();
  words tsquery;
  own tsquery;
begin
  if q is null or length(btrim(q)) not between 1 and 200 then
    perform pgscribe.reject('q', 'must have 1 to 200 characters', 'Search for a few words, or a "phrase".');
  elsif "limit" is null or "limit" not between 1 and 101 then
    perform pgscribe.reject('limit', 'must be from 1 to 100', 'Ask for more after the last one.');
  end if;
  words := pgscribe.search_query(btrim(q));
  if owner is null or numnode(words) = 0 then
    return;
  end if;
  own := (''' ' || owner || '''')::tsquery && words;
  return query
    with found as materialized (
      select p.id, p.created_at from public.processing_jobs p
       where p.user_id = owner and p.status = 'completed' and p.result ->> 'text' <> ''
         and pgscribe.search_document(p.user_id, p.result) @@ own
         and (after_created_at is null or (p.created_at, p.id) < (after_created_at, coalesce(after_id, '00000000-0000-0000-0000-000000000000')))
       order by p.created_at desc, p.id desc limit "limit")
    select p.id, p.created_at, p.file_path, p.result ->> 'language', p.audio_seconds,
           pgscribe.search_hits(p.result, coalesce(pgscribe.search_words(btrim(q), words), words))
      from found f join public.processing_jobs p on p.id = f.id
     order by f.created_at desc, f.id desc;
end $$;
comment on function public.search_transcripts is
  'Finds words in the transcripts of the caller''s completed jobs, newest first, after the given place in the list. q: 1 to 200 characters: words, "a phrase", or, -without. hits: up to three segments, with the matches between the control characters 2 and 3.';
revoke execute on function public.search_transcripts from public, anon, service_role;
grant execute on function public.search_transcripts to authenticated;

revoke execute on all functions in schema pgscribe from public, anon, authenticated, service_role;
