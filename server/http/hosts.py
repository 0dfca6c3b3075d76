"""The names under which a server may be addressed: a guard against DNS rebinding.

A page of any site can have its own name resolve to 127.0.0.1; its requests then carry that name as their Host.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def default_hosts(listening: str) -> tuple[str, ...]:
    """The allowed names of a server that listens there: loopback names on loopback, else any (no names)."""
    if not is_loopback(listening):
        return ()
    address = f"[{listening}]" if ":" in listening else listening
    return tuple(dict.fromkeys((*LOOPBACK_NAMES, address.lower())))


def is_allowed(header: str, hosts: Sequence[str]) -> bool:
    """True if the Host header's name is one of `hosts`; `*.example.com` allows every name below it, `*` any."""
    name = header.lower()
    if not name.endswith("]"):
        bare, colon, port = name.rpartition(":")
        name = bare if colon and port.isdecimal() else name
    return any(
        host in ("*", name) or (host.startswith("*.") and name.endswith(host[1:]) and len(name) > len(host) - 1)
        for host in hosts
    )
