// Posts a message with @microsoft/fetch-event-source and reads the answer; prints the text that its deltas make.
globalThis.window = globalThis
globalThis.document = { hidden: false, addEventListener () {}, removeEventListener () {} }
const { fetchEventSource } = await import('@microsoft/fetch-event-source')

const [url, key, content] = process.argv.slice(2)
let text = ''
let opened = 0
let final = null
let snapshots = 0
const read = message => {
  if (!message.event) return
  const event = JSON.parse(message.data)
  if (event.type === 'message.delta') {
    if (event.offset !== [...text].length) throw new Error(`hole: ${event.offset} after ${[...text].length}`)
    text += event.text
  }
  if (event.type.endsWith('.snapshot')) snapshots += 1
  if (event.type === 'run.completed') final = event.message.content
}
await fetchEventSource(url, {
  method: 'POST',
  headers: { Authorization: `Bearer ${key}`, 'Content-Type': 'application/json', Accept: 'text/event-stream', 'Idempotency-Key': 'once' },
  body: JSON.stringify({ content }),
  openWhenHidden: true,
  onopen: async () => { opened += 1 },
  onmessage: read,
  onerror: () => 20
})
console.log(JSON.stringify({ text, final, opened, snapshots }))
