"""What an import or an export has done so far."""

from __future__ import annotations

import time

import click
import msgspec

PROGRESS_SECONDS = 2.0


class Counts(msgspec.Struct):
    """Threads and messages that were written.

    Attributes:
        threads: new threads, or exported ones.
        extended: threads that existed, to which something was added.
        present: threads that existed, to which nothing was added.
        messages: in all of them.
    """

    threads: int = 0
    extended: int = 0
    present: int = 0
    messages: int = 0

    def __str__(self) -> str:
        parts = [f"{self.threads:,} threads", f"{self.messages:,} messages"]
        if self.extended:
            parts.append(f"{self.extended:,} existing threads changed")
        if self.present:
            parts.append(f"{self.present:,} threads already there")
        return ", ".join(parts)


class Progress:
    """Prints the counts to standard error, every few seconds."""

    def __init__(self) -> None:
        self._due = time.monotonic() + PROGRESS_SECONDS

    def report(self, counts: Counts) -> None:
        """Print the counts if it is time to."""
        if time.monotonic() >= self._due:
            click.echo(f"{counts} …", err=True)
            self._due = time.monotonic() + PROGRESS_SECONDS
