"""Graphs of a device that is not there: a capture runs the body once, as on a device, and keeps
it; a replay runs it. A graph that was closed cannot be replayed."""

from __future__ import annotations

from collections.abc import Callable

from xllm.errors import EngineError, InvariantError


class FakeGraph:
    """One captured body."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run: Callable[[], None] | None = run
        self.name = getattr(run, "name", "")

    @property
    def is_open(self) -> bool:
        return self._run is not None

    def replay(self) -> None:
        if self._run is None:
            raise InvariantError("replay of a graph that was closed")
        self._run()

    def close(self) -> None:
        self._run = None


class _Body:
    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.name = name
        self._run = run

    def __call__(self) -> None:
        self._run()


class FakeGraphs:
    """A GraphDevice. Captures of bodies whose name is in `failing` fail."""

    def __init__(self, failing: set[str] | None = None) -> None:
        self._failing = failing or set()
        self.graphs: list[FakeGraph] = []
        self.num_failures = 0

    @property
    def num_captures(self) -> int:
        return len(self.graphs)

    def body(self, name: str, run: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """A body with a name."""
        return _Body(name, run)

    def capture(self, run: Callable[[], None]) -> FakeGraph:
        name = getattr(run, "name", "")
        run()
        if name in self._failing:
            self.num_failures += 1
            raise EngineError(f"capture of {name} failed")
        graph = FakeGraph(run)
        self.graphs.append(graph)
        return graph

    def open_graphs(self) -> list[FakeGraph]:
        return [graph for graph in self.graphs if graph.is_open]

    def close(self) -> None:
        for graph in self.graphs:
            graph.close()
