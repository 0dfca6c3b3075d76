"""The host names under which a server accepts requests: a protection against DNS rebinding.

Any site can let its own name resolve to 127.0.0.1; requests of its pages to this server then have that name as Host.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Return True for `localhost` and loopback addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def default_hosts(listening: str) -> tuple[str, ...]:
    """Return the allowed names for a listening address: loopback names for loopback, else none, which allows all."""
    if not is_loopback(listening):
        return ()
    address = f"[{listening}]" if ":" in listening else listening
    return tuple(dict.fromkeys((*LOOPBACK_NAMES, address.lower())))


def is_allowed(header: str, hosts: Sequence[str]) -> bool:
    """Return True if `hosts` contains the Host header's name; `*.example.com` allows its subdomains, `*` every name."""
    name = header.lower()
    if not name.endswith("]"):
        bare, colon, port = name.rpartition(":")
        name = bare if colon and port.isdecimal() else name
    return any(
        host in ("*", name) or (host.startswith("*.") and name.endswith(host[1:]) and len(name) > len(host) - 1)
        for host in hosts
    )
