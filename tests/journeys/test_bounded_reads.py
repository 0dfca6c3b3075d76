"""Reads of many megabytes: bounded, and paged to the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.servers import live_server

MEGABYTE = 2**20


async def test_message_pages_are_limited_to_8_mb_and_lead_to_the_first_message(tmp_path: Path) -> None:
    async with live_server(tmp_path) as live:
        thread = await live.scripted_thread()
        for number in range(12):
            body = {"content": f"{number} " + "x" * (MEGABYTE - 10), "content_html": "", "role": "system"}
            assert (await live.http.post(f"{thread}/messages", json=body)).status_code == 201
        found: list[str] = []
        before: dict[str, str] = {}
        sizes = []
        while True:
            answer = await live.http.get(f"{thread}/messages", params={"limit": "100", **before})
            page = answer.json()
            sizes.append(len(answer.content))
            found = [message["content"].split()[0] for message in page] + found
            if "X-Messages-Cut" not in answer.headers:
                break
            before = {"before": page[0]["id"]}
        assert found == [str(number) for number in range(12)]
        assert max(sizes) < 8 * MEGABYTE + 10_000
        assert len(sizes) == 2


@pytest.mark.slow
async def test_agents_are_paged_by_links(tmp_path: Path) -> None:
    async with live_server(tmp_path) as live:
        made = [(await live.agent(instructions=f"{number}" + "x" * 190_000))["id"] for number in range(45)]
        found: list[str] = []
        url = "/api/v1/agents?limit=100&offset=1"  # the first is the organization's own
        pages = 0
        while url:
            answer = await live.http.get(url)
            assert len(answer.content) < 8 * MEGABYTE
            found += [agent["id"] for agent in answer.json()]
            url = answer.headers.get("Link", "").partition(">")[0].lstrip("<")
            pages += 1
        assert found == made
        assert pages == 2
        assert (await live.http.get("/api/v1/agents", params={"limit": "101"})).status_code == 422
