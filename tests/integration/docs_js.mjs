// Runs snippets with the real supabase-js. Standard input says which, and where the project's services are;
// what the services answered to each snippet goes to standard output.
import { createRequire } from 'node:module'
import { readFileSync } from 'node:fs'

const { tools, services, blocks, password, user: address } = JSON.parse(readFileSync(0))
const require = createRequire(`${tools}/`)
const { createClient } = require('@supabase/supabase-js')
const ws = require('ws')

const PROJECT = 'https://project.example.org'
let answers = []

// In the place of the gateway: the services are on ports of their own, with tokens of their own.
const through = (role) => async (url, options = {}) => {
  const asked = new URL(url)
  const [name] = Object.keys(services).filter((name) => asked.pathname.startsWith(`/${name}/`))
  const headers = new Headers(options.headers)
  const { base, keys } = services[name]
  if (keys[role]) headers.set('Authorization', `Bearer ${keys[role]}`)
  if (keys.apikey) headers.set('apikey', keys.apikey)
  const response = await fetch(base + asked.pathname + asked.search, { ...options, headers })
  const text = await response.clone().text()
  answers.push({ service: name, status: response.status, body: text && JSON.parse(text) })
  return response
}

// Realtime: says yes to who joins, and tells of one change, as its protocol has it.
const joined = []
const realtime = new ws.WebSocketServer({ host: '127.0.0.1', port: 0 })
realtime.on('connection', (socket) => socket.on('message', (data) => {
  const [joinRef, ref, topic, event, payload] = JSON.parse(data)
  const send = (...message) => socket.send(JSON.stringify(message))
  if (event !== 'phx_join') return
  const changes = payload.config.postgres_changes
  joined.push(...changes)
  const ids = changes.map((change, n) => ({ id: n + 1, ...change }))
  send(joinRef, ref, topic, 'phx_reply', { status: 'ok', response: { postgres_changes: ids } })
  send(joinRef, null, topic, 'system', { status: 'ok', extension: 'postgres_changes', message: '' })
  send(null, null, topic, 'postgres_changes', {
    ids: ids.map(({ id }) => id),
    data: {
      schema: 'public', table: 'processing_jobs', type: 'UPDATE', errors: null,
      commit_timestamp: '2026-11-26T10:00:00Z', columns: [{ name: 'status', type: 'text' }],
      record: { status: 'processing' }, old_record: {},
    },
  })
}))
await new Promise((done) => realtime.once('listening', done))
class Transport extends ws {
  constructor (_address, ...rest) { super(`ws://127.0.0.1:${realtime.address().port}`, ...rest) }
}

const client = (role) => createClient(PROJECT, 'sb_publishable_key', {
  global: { fetch: through(role) },
  realtime: { transport: Transport },
  auth: { persistSession: false, autoRefreshToken: false },
})
const supabase = client('user')
const admin = client('admin')
const { error: refused } = await supabase.auth.signInWithPassword({ email: address, password })
if (refused) throw refused
const { data: { user } } = await supabase.auth.getUser()

const late = () => new Promise((_, fail) => setTimeout(() => fail(new Error('nothing came')), 10_000))
const results = []
for (const { code, given, waits } of blocks) {
  answers = []
  let shown
  const seen = new Promise((done) => { shown = done })
  const names = {
    supabase, admin, user, user_id: user.id, userId: user.id, show: shown, fetchTranscript: shown,
    file: new File(['audio'], 'talk.mp3', { type: 'audio/mpeg' }),
    file_path: `${user.id}/talk.mp3`, ...given,
  }
  const run = Object.getPrototypeOf(async () => {}).constructor
  const declared = Object.keys(names).filter((key) => !code.match(new RegExp(`const .*\\b${key}\\b.* =`)))
  try {
    await run(...declared, code)(...declared.map((key) => names[key]))
    if (waits) await Promise.race([seen, late()])
    results.push({ answers })
  } catch (error) {
    results.push({ answers, error: String(error) })
  }
}
process.stdout.write(JSON.stringify({ results, joined }), () => process.exit(0))
