"""The kinds of agents: which `reply` answers for `agent.kind`.

Other packages add kinds by an entry point in the group `chat.agents` whose name is the kind and whose object is the
reply function (or a Kind, to make titles too).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points

import msgspec

from agent_chat.agents import AgentError, MakeTitle, Reply, titles

logger = logging.getLogger(__name__)


class Kind(msgspec.Struct, frozen=True):
    reply: Reply
    title: MakeTitle = titles.from_first_message


class Registry(Mapping[str, Kind]):
    """Kinds by name: the given ones, then those of installed packages that don't take a given name."""

    def __init__(self, kinds: Mapping[str, Kind], *, installed: bool = True) -> None:
        self._kinds = dict(kinds)
        for point in entry_points(group="chat.agents") if installed else ():
            if point.name not in self._kinds:
                try:
                    found = point.load()
                except Exception:
                    logger.warning("agent kind %r skipped: %s cannot be loaded", point.name, point.value, exc_info=True)
                    continue
                self._kinds[point.name] = found if isinstance(found, Kind) else Kind(found)

    def __getitem__(self, name: str) -> Kind:
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def kind(self, name: str) -> Kind:
        """The kind of that name. Raises: AgentError if this server has no such kind (any more)."""
        if name not in self:
            raise AgentError(f"This server has no agents of kind {name!r}.")
        return self[name]
