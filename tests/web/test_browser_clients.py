"""The browser's own EventSource and WebSocket: stream, break off, resume by position, exact text."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.web.browser import Visit

pytestmark = pytest.mark.timeout(40)

SCRIPT = "say Ünï🎈 \ncount 150 5\nsay end"
READ = """
async ({ thread, door }) => {
  let text = null, position = null, final = null, opened = 0
  const take = event => {
    if (event.position) position = event.position
    if (event.type === 'thread.snapshot') {
      text = event.thread.messages.at(-1)?.content ?? ''
      dispatchEvent(new Event('watching'))
    }
    if (event.type === 'message.delta') {
      if (event.offset !== [...text].length) throw new Error(`hole at ${event.offset}`)
      text += event.text
    }
    if (event.type === 'run.completed') final = event.message.content
  }
  addEventListener('watching', () => { window.watching = true })
  const query = () => position ? `?after=${position}` : ''
  const connect = limit => new Promise((resolve, reject) => {
    let seen = 0
    const told = (event, close) => {
      try { take(event) } catch (error) { close(); reject(error) }
      if (final !== null || (limit && ++seen >= limit)) { close(); resolve() }
    }
    opened += 1
    if (door === 'websocket') {
      const socket = new WebSocket(`${location.origin.replace('http', 'ws')}${thread}/ws${query()}`)
      socket.onmessage = message => told(JSON.parse(message.data), () => { socket.onmessage = null; socket.close() })
      return
    }
    const source = new EventSource(`${thread}/events${query()}`)
    let open = true
    const listen = type => source.addEventListener(type, message => {
      if (!open) return
      told({ ...JSON.parse(message.data), position: message.lastEventId }, () => { open = false; source.close() })
    })
    const types = ['thread.snapshot', 'message.created', 'run.started', 'message.delta', 'run.completed']
    types.forEach(listen)
  })
  for (const limit of [1, 7, 20, 1, 40, 3, 0]) if (final === null) await connect(limit)
  return { text, final, opened }
}
"""
WATCHING = (
    "window.watching || new Promise(resolve => addEventListener('watching', resolve, { once: true })).then(() => 1)"
)


@pytest.mark.parametrize("door", ["eventsource", "websocket"])
async def test_the_browsers_own_client_breaks_off_again_and_again_and_has_every_character_once(
    visit: Visit, door: str
) -> None:
    agent = await visit.choose(kind="scripted")
    thread = await visit.server.thread(agent["id"])
    reading = asyncio.create_task(visit.page.evaluate(READ, {"thread": thread, "door": door}))
    async with asyncio.timeout(10):
        await visit.page.evaluate(WATCHING)
    answer = (await visit.server.say(thread, SCRIPT)).json()
    async with asyncio.timeout(30):
        found: dict[str, Any] = await reading
    assert found["final"] == answer["content"]
    assert found["text"] == answer["content"]
    assert found["opened"] > 2
