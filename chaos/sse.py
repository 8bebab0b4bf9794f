"""Server-sent events out of lines: data, id, and nothing else that this API uses. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event; `event_id` is the last one that was seen, as the standard has it."""

    data: str
    event_id: str


@dataclass(slots=True)
class EventParser:
    """Takes lines without their ends; comments are dropped."""

    event_id: str = ""
    _data: list[str] = field(default_factory=list)

    def take(self, line: str) -> ServerEvent | None:
        """The event that this line completes."""
        if not line:
            event = ServerEvent("\n".join(self._data), self.event_id) if self._data else None
            self._data = []
            return event
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "id":
            self.event_id = value
        return None
