"""What the server adds to the first token, with a warm pool; tests/bench/first_token.py measures it properly."""

import statistics

from tests.agents.standin import StandIn
from tests.bench.first_token import first_tokens
from tests.journeys.live import Live

BOUND_MS = 75
"""Client, server and stand-in share one loop here, and the machine may be busy; alone the server adds about 10 ms."""


async def test_the_server_adds_little_to_the_first_token(live: Live, service: StandIn) -> None:
    through, direct = await first_tokens(live, service.url, 30)
    assert statistics.median(through) - statistics.median(direct) < BOUND_MS
