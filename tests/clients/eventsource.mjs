// Watches a thread with npm's `eventsource` until the run ends; prints the text that its deltas make, as JSON.
import { EventSource } from 'eventsource'

const [url, key] = process.argv.slice(2)
const source = new EventSource(url, {
  fetch: (input, init) => fetch(input, { ...init, headers: { ...init.headers, Authorization: `Bearer ${key}` } })
})
let text = ''
let opened = 0
let snapshots = 0
source.addEventListener('open', () => { opened += 1 })
source.addEventListener('thread.snapshot', event => {
  const { messages } = JSON.parse(event.data).thread
  text = messages.at(-1)?.content ?? ''
  snapshots += 1
  console.error('watching')
})
source.addEventListener('message.delta', event => {
  const { offset, text: more } = JSON.parse(event.data)
  const characters = [...text]
  if (offset !== characters.length) { console.log(JSON.stringify({ hole: [offset, characters.length] })); process.exit(1) }
  text += more
})
source.addEventListener('run.completed', event => {
  console.log(JSON.stringify({ text, final: JSON.parse(event.data).message.content, opened, snapshots }))
  source.close()
})
