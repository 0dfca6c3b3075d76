"""The time constants of runs, requests, streams and background loops, in one place, passed in by the lifespan.

Tests pass a Timing with short times in place of the defaults. What an operator sets is in `Settings`. Times that belong
to one mechanism stand with it: of connections in `ConnectionLimits`, of worker processes in `WorkerLimits`, of the stop
in `serving`, of the log in Redis in `RedisTiming`.
"""

from __future__ import annotations

import msgspec

from agent_chat.stores.contracts import LEASE_SECONDS


class Timing(msgspec.Struct, frozen=True):
    """Times in seconds.

    Attributes:
        lease: how long a run belongs to its process without a checkpoint. The store must be opened with the same value.
        checkpoint: the interval at which a run's partial message is stored and its lease renewed.
        sweep: the interval at which orphaned runs and unpublished facts are looked for.
        usage_sweep: the interval at which old usage rows are rolled up.
        storage_sweep: the interval at which due blobs are deleted.
        store_retry: the pause before the first retry of a call to an unreachable store; it doubles up to a tenth of
            a lease.
        agent_stop: how long an agent may take to stop once it is cancelled; also each step of a drain.
        cancel: how long a canceller waits for the run's own process before it ends the run itself.
        title: how long generating a title may take.
        poll: the interval at which a waiting request reads the run's message, whatever the log brings.
        answer_patience: how long a waiting request tolerates an unreachable store.
        unreachable_pause: the pause before a store or a log that is unreachable is asked again.
        fact_flush: how long the publication of facts may take before they are left in the outbox.
        repeated_gap: gaps of one reader that follow each other within this time are paused between.
        ping: the interval at which open streams are pinged and their keys checked.
        key_lookup: how long the lookup of a key or a session is cached; 0 caches nothing.
        key_hold: after how long a CHAT_API_KEY that no process of a shared database has is revoked.
        auth_delay: how much later a wrong key is refused once its address has sent too many.
        body_silence: how long a client may send nothing of its body.
        rate_pause: how long a WebSocket that exceeds its rate is not read.
        others: for how long after its last step an organization counts as being served, so that others yield to it. A
            run takes a step every two seconds.
        restart: the pause before a background loop that failed is started again; it doubles up to `longest_restart`.
        longest_restart: see `restart`.
        healthy: after how long without a failure a background loop counts as healthy again.
    """

    lease: float = LEASE_SECONDS
    checkpoint: float = 2.0
    sweep: float = 5.0
    storage_sweep: float = 30.0
    usage_sweep: float = 3600.0
    store_retry: float = 0.1
    agent_stop: float = 5.0
    cancel: float = 5.0
    title: float = 30.0
    poll: float = 5.0
    answer_patience: float = 30.0
    unreachable_pause: float = 0.5
    fact_flush: float = 2.0
    repeated_gap: float = 5.0
    ping: float = 15.0
    key_lookup: float = 3.0
    key_hold: float = 60.0
    auth_delay: float = 1.0
    body_silence: float = 60.0
    rate_pause: float = 0.25
    others: float = 3.0
    restart: float = 0.5
    longest_restart: float = 30.0
    healthy: float = 60.0
