// Watches a thread with npm's `eventsource` until the run ends; prints the text that its deltas make, as JSON.
import { EventSource } from 'eventsource'

const [url, key] = process.argv.slice(2)
const source = new EventSource(url, {
  fetch: (input, init) => fetch(input, { ...init, headers: { ...init.headers, Authorization: `Bearer ${key}` } })
})
let text = ''
let opened = 0
source.addEventListener('open', () => { opened += 1; console.error('open') })
source.addEventListener('thread.snapshot', event => {
  text = JSON.parse(event.data).thread.messages.at(-1)?.content ?? ''
})
source.addEventListener('message.delta', event => {
  const { offset, text: more } = JSON.parse(event.data)
  const characters = [...text]
  if (offset !== characters.length) { console.log(JSON.stringify({ hole: [offset, characters.length] })); process.exit(1) }
  text += more
})
source.addEventListener('run.completed', event => {
  console.log(JSON.stringify({ text, final: JSON.parse(event.data).message.content, opened }))
  source.close()
})
