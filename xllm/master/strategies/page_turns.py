"""Several models over one pool of pages: whose waiting sequence gets the next pages.

Where memory is plentiful everybody starts as it comes. A model whose next sequence finds no room
stands in a line with the others that find none or may not try; only the first in line starts
sequences, and goes to the end once it started one and needs more. What runs goes on and ends, so
that the first one's turn comes however much the others would like to start. Pure; knows no pages.
Invariant: nobody is in line twice.
"""

from __future__ import annotations


class PageTurns:
    """The line of the models that wait for pages."""

    def __init__(self) -> None:
        self._line: list[str] = []

    def may_start(self, model: str) -> bool:
        """Whether a sequence of the model may start; if not, the model is in line now. Mutates."""
        if not self._line or self._line[0] == model:
            return True
        self.lacks(model)
        return False

    def lacks(self, model: str) -> None:
        """Its next sequence finds no pages. Mutates."""
        if model not in self._line:
            self._line.append(model)

    def leave(self, model: str) -> None:
        """It started a sequence, or none of its waits any more. Mutates."""
        if model in self._line:
            self._line.remove(model)
