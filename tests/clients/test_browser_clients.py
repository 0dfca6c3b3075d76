"""The browser's own EventSource and WebSocket over a network that cuts: every character once, and one snapshot."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support.browser import CUT, Desk
from tests.support.proxy import HTTPProxy
from tests.support.servers import Live

SCRIPT = "say Ünï🎈 \ncount 150 2\nsay end"
CUTS = [600, 150, 4000, 1, 2500]
"""In the first frame, in the head of an answer, in the text; some 30,000 bytes come in all."""
READ = """
async ({ thread, door }) => {
  const read = { text: null, final: null, snapshots: 0 }
  const take = event => {
    if (event.type === 'thread.snapshot') {
      read.text = event.thread.messages.at(-1).content
      read.snapshots += 1
      dispatchEvent(new Event('watching'))
    }
    if (event.type === 'message.delta') {
      if (event.offset !== [...read.text].length) throw new Error(`hole at ${event.offset} behind ${read.text}`)
      read.text += event.text
    }
    if (event.type === 'run.completed') read.final = event.message.content
    return read.final !== null
  }
  addEventListener('watching', () => { window.watching = true })
  await new Promise((resolve, reject) => {
    const told = (event, close) => {
      try { if (take(event)) { close(); resolve() } } catch (error) { close(); reject(error) }
    }
    const eventsource = () => { // it comes back by itself
      const source = new EventSource(`${thread}/events`)
      const types = ['thread.snapshot', 'message.created', 'run.started', 'message.delta', 'run.completed']
      types.forEach(type => source.addEventListener(type, ({ data }) => told(JSON.parse(data), () => source.close())))
    }
    const websocket = position => {
      const base = `${location.origin.replace('http', 'ws')}${thread}/ws`
      const socket = new WebSocket(base + (position ? `?after=${position}` : ''))
      socket.onclose = () => { setTimeout(websocket, 20, position) }
      socket.onmessage = ({ data }) => {
        const event = JSON.parse(data)
        position = event.position
        told(event, () => { socket.onclose = null; socket.close() })
      }
    }
    ({ eventsource, websocket })[door]()
  })
  return read
}
"""
WATCHING = (
    "window.watching || new Promise(resolve => addEventListener('watching', resolve, { once: true })).then(() => 1)"
)


@pytest.mark.parametrize(("door", "position"), [("eventsource", "last-event-id: "), ("websocket", "/ws?after=")])
async def test_the_browsers_own_client_is_cut_again_and_again_and_has_every_character_once(
    desk: Desk, server: Live, door: str, position: str
) -> None:
    thread = await server.scripted_thread()
    asking = asyncio.create_task(server.post(thread, f"hold for {door}\n{SCRIPT}"))
    await server.gates.reached(f"for {door}")
    async with (
        HTTPProxy(server.port, CUTS, retry_ms=20) as proxy,
        desk.visit(server, base_url=proxy.url) as visit,
        asyncio.timeout(30),
    ):
        visit.expected = [CUT.pattern, "WebSocket connection to"]
        await visit.enter()
        reading = asyncio.create_task(visit.page.evaluate(READ, {"thread": thread, "door": door}))
        await visit.page.evaluate(WATCHING)
        server.gates.release(f"for {door}")
        found: dict[str, Any] = await reading
        assert proxy.cuts == len(CUTS)
        assert position not in proxy.streams[0].lower()
        assert position in proxy.streams[-1].lower()
        assert door == "websocket" or not any("after=" in head for head in proxy.streams)
    assert found["final"] == found["text"] == (await asking).json()["content"]
    assert found["snapshots"] == 1
