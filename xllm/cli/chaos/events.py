"""Reading along with the logs of a cluster: what its processes noticed, and when."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Collection
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Event:
    """One line of a log. `at`: wall time, seconds."""

    at: float
    process: str
    name: str
    words: str
    """All of its fields, for matching names of instances."""


class FileTail:
    """The whole lines that a file gained since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def lines(self) -> list[str]:
        """New lines; none where the file is not there yet."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return []
        whole, mark, _ = data.rpartition(b"\n")
        if not mark:
            return []
        self._at += len(whole) + 1
        return whole.decode("utf-8", "replace").split("\n")


class EventLog:
    """The JSON logs in a directory, one file a process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tails: dict[Path, FileTail] = {}
        self.events: list[Event] = []

    def read(self) -> None:
        """Take in what was written since."""
        for path in sorted(self._directory.glob("*.log")):
            if path not in self._tails:
                self._tails[path] = FileTail(path)
            for line in self._tails[path].lines():
                event = _parse(line)
                if event is not None:
                    self.events.append(event)

    def find(self, names: Collection[str], since: float, word: str = "") -> Event | None:
        """The first event of these names since a wall time, that holds `word` in its fields."""
        found = [
            one
            for one in self.events
            if one.at >= since and one.name in names and (not word or word in one.words)
        ]
        return min(found, key=lambda event: event.at, default=None)

    def count(self, names: Collection[str], since: float) -> int:
        """How many events of these names since a wall time."""
        return sum(one.at >= since and one.name in names for one in self.events)


def _parse(line: str) -> Event | None:
    """None for a line that is no event: a traceback, say, or a word of a library."""
    try:
        fields = json.loads(line)
        at = datetime.datetime.fromisoformat(fields["timestamp"]).timestamp()
        return Event(at, str(fields.get("process", "")), str(fields["event"]), line)
    except (ValueError, KeyError, TypeError):
        return None
