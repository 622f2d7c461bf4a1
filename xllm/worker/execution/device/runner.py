"""Runs the rows of a step through a model's layers, and draws: as one graph, as graphs between
attentions, or operator by operator.

The three give the same numbers: they start the same kernels on the same shapes but for padding.
Invariant: a body that may be captured reads its inputs from tensors that stay and overwrites
nothing that it read, so that it can be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import torch

from xllm.worker.execution.device.draws import DeviceDrawing, StepDraws
from xllm.worker.execution.device.layer import DeviceLayer
from xllm.worker.execution.device.ops import DeviceOps, SequenceRows
from xllm.worker.execution.device.rows import StepRows, nobodys_row
from xllm.worker.execution.device.runs import DecodeRun, decode_runs
from xllm.worker.execution.device.stretch import StretchTensors
from xllm.worker.execution.device.tensors import StaticNumbers, StepTensors, upload_numbers
from xllm.worker.execution.device.warming import attend_nobody, draw_nobody
from xllm.worker.graphs.cache import GraphCache, GraphStatistics
from xllm.worker.graphs.choice import (
    EAGER,
    DrawKind,
    GraphChooser,
    GraphKey,
    GraphLimits,
    GraphMode,
)
from xllm.worker.graphs.footprint import NO_GRAPHS, GraphFootprint, bytes_each
from xllm.worker.models.model import NativeModel
from xllm.worker.platform.platform import Platform

MAX_GRAPHS = 64
"""Kinds of steps whose graphs are kept; of a partial one there are as many as layers, and one."""
CAPTURE_SHARE = 0.05
"""Of the time in service, at most, for captures: the engine stands meanwhile."""


class DeviceRunner:
    """The layers of one model and its `drawing`, which has the tokens that the host does not know;
    `most`: sequences of a step; `tick` is called after each layer that is launched, and as
    often for a graph. Used by one thread."""

    def __init__(
        self,
        model: NativeModel,
        layers: list[DeviceLayer],
        ops: DeviceOps,
        platform: Platform,
        drawing: DeviceDrawing,
        dtype: torch.dtype,
        limits: GraphLimits,
        most: int,
        tick: Callable[[], None],
    ) -> None:
        self._model = model
        self._layers = layers
        self._ops = ops
        self._platform = platform
        self._drawing = drawing
        self._dtype = dtype
        self._tick = tick
        self._most = most
        self._max_rows_each = limits.max_rows_each
        self._chooser = GraphChooser(limits)
        device = platform.graphs()
        self._graphs: GraphCache | None = None
        self._static: dict[GraphKey, StaticNumbers] = {}
        if device is not None and (limits.max_batch or limits.max_rows):
            self._graphs = GraphCache(device, MAX_GRAPHS, dropped=self._drop)
            most_rows = max(limits.max_batch * limits.max_rows_each, limits.max_rows)
            self._stretch = StretchTensors(model.config, most_rows, dtype, platform.device)
        self._num_steps = dict.fromkeys(GraphMode, 0)
        self.num_drawn_whole = 0
        """Steps whose draw was a part of their graph."""
        self.footprint = NO_GRAPHS

    @property
    def steps_by_mode(self) -> dict[GraphMode, int]:
        """Steps so far by the mode that they ran in."""
        return dict(self._num_steps)

    def graph_statistics(self) -> GraphStatistics | None:
        """None: there are no graphs."""
        return None if self._graphs is None else self._graphs.statistics()

    def run(self, rows: StepRows, draws: StepDraws | None = None) -> torch.Tensor:
        """The last layer's output [rows, hidden] of a step's rows, on the device; valid until the
        next call. `draws`: launched behind it."""
        kind = DrawKind.NONE if draws is None else draws.kind
        key, hidden, tensors = self._launch(rows, draws, kind)
        self._num_steps[key.mode] += 1
        if kind is not DrawKind.NONE:
            if key.draws is DrawKind.NONE:
                self._draw(hidden, tensors, kind)
            else:
                self.num_drawn_whole += 1
        return hidden[: rows.counts.num_rows]

    def warm_up(self, keys: tuple[GraphKey, ...] | None = None) -> None:
        """Have all kernels compiled, and capture what is worth it before the first request; None:
        what the chooser says."""
        config, platform = self._model.config, self._platform
        attend_nobody(
            self._ops, config, self._dtype, platform.device, self._most, self._max_rows_each
        )
        draw_nobody(self._drawing, platform, config.hidden_size, self._dtype)
        # What cannot be run at all is no failure of a capture.
        self._eager(nobodys_row(), None)
        if self._graphs is None:
            return
        wanted = self._chooser.warm_keys() if keys is None else keys
        platform.trim()
        free = [platform.memory().free_bytes]
        for key in wanted:
            self._graphs.run(key, self._full_body(key))
            free += [platform.memory().free_bytes]
        taken = max(free[0] - free[-1], 0) + self._stretch.num_bytes
        self.footprint = GraphFootprint(taken, bytes_each(free), MAX_GRAPHS)
        self._graphs.bound_captures(CAPTURE_SHARE)

    def close(self) -> None:
        """Give the graphs up."""
        if self._graphs is not None:
            self._graphs.close()
        self._static.clear()

    def _launch(
        self, rows: StepRows, draws: StepDraws | None, kind: DrawKind
    ) -> tuple[GraphKey, torch.Tensor, StepTensors]:
        """What the step was launched as, its output, padded, and its numbers on the device."""
        graphs, is_wanted = self._graphs, True
        for key in self._chooser.choose(rows.shape(kind)):
            if graphs is None or key.mode == GraphMode.EAGER:
                break
            # A lesser graph serves where it is there; it is captured where no better one can be.
            if graphs.is_held(key) or (is_wanted and graphs.is_open(key)):
                found = self._through(graphs, key, rows, draws)
                if found is not None:
                    return key, *found
            is_wanted = is_wanted and graphs.has_failed(key)
        return EAGER, *self._eager(rows, draws)

    def _through(
        self, graphs: GraphCache, key: GraphKey, rows: StepRows, draws: StepDraws | None
    ) -> tuple[torch.Tensor, StepTensors] | None:
        """The step through the graphs of a key; None: they are not to be had."""
        if key.mode == GraphMode.PARTIAL:
            return self._partial(graphs, key, rows, draws)
        numbers = self._numbers(key)
        numbers.fill(rows, draws)
        if not graphs.run(key, self._full_body(key)):
            return None
        for _ in self._layers:
            self._tick()
        return self._stretch.hidden[: key.num_rows], numbers.tensors

    # -- operator by operator --------------------------------------------------------------------

    def _eager(self, rows: StepRows, draws: StepDraws | None) -> tuple[torch.Tensor, StepTensors]:
        tensors = upload_numbers(self._platform, rows, self._tiles(rows), draws)
        residual = self._embed(tensors)
        angles = self._model.angles(tensors.positions)
        config = self._model.config
        num_rows = rows.counts.num_rows
        shape = (num_rows, config.num_heads, config.head_dim)
        q = torch.empty(shape, dtype=self._dtype, device=residual.device)
        attended = torch.empty_like(q)
        runs = decode_runs(rows, tensors)
        added: torch.Tensor | None = None
        for layer in self._layers:
            addresses, positions = tensors.row_addresses, tensors.positions
            layer.before(added, residual, angles, addresses, positions, q)
            self._attend(layer.index, rows, tensors, runs, q, attended)
            added = layer.behind(attended.view(num_rows, -1), residual)
            self._tick()
        assert added is not None
        return residual.add_(added), tensors

    def _attend(
        self,
        layer: int,
        rows: StepRows,
        tensors: StepTensors,
        runs: list[DecodeRun],
        q: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Decodes as one batch for each number of rows, all others as prompts."""
        counts = rows.counts
        for run in runs:
            own = run.rows
            self._ops.attend_decodes(layer, q[own], run.sequences, run.rows_each, out[own])
        if counts.num_attended < counts.num_sequences:
            of = SequenceRows(tensors.addresses, tensors.lengths)
            self._ops.attend_prompts(layer, q, of, tensors.row_starts, tensors.row_tiles, out)

    def _tiles(self, rows: StepRows) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
        border = rows.counts.num_attended
        counts = np.diff(rows.row_starts)[border:].tolist()
        tiles = self._ops.tile_rows(counts, rows.lengths[border:].tolist())
        # Counted from the first sequence of all: their arrays are not cut, see `tensors`.
        found = np.array(tiles, dtype=np.int32).reshape(-1, 2)
        found[:, 0] += border
        return found

    def _embed(self, tensors: StepTensors) -> torch.Tensor:
        drawn = self._drawing.drawn.flat[tensors.sources.clamp(min=0)].clamp_(min=0)
        ids = torch.where(tensors.sources >= 0, drawn, tensors.token_ids)
        return self._model.embed(ids)

    def _draw(self, hidden: torch.Tensor, tensors: StepTensors, kind: DrawKind) -> None:
        self._drawing.draw(hidden, tensors.read_rows, tensors.draws, tensors.places, kind)

    # -- one graph -------------------------------------------------------------------------------

    def _numbers(self, key: GraphKey) -> StaticNumbers:
        found = self._static.get(key)
        if found is None:
            found = StaticNumbers(self._platform, key.num_rows, key.num_sequences)
            self._static[key] = found
        return found

    def _full_body(self, key: GraphKey) -> Callable[[], None]:
        tensors, stretch = self._numbers(key).tensors, self._stretch
        rows, hidden = key.num_rows, stretch.hidden[: key.num_rows]
        sequences = SequenceRows(tensors.addresses, tensors.lengths)

        def body() -> None:
            residual = self._embed(tensors)
            angles = self._model.angles(tensors.positions)
            q, attended = stretch.q[:rows], stretch.attended[:rows]
            added: torch.Tensor | None = None
            for layer in self._layers:
                addresses, positions = tensors.row_addresses, tensors.positions
                layer.before(added, residual, angles, addresses, positions, q)
                self._ops.attend_decodes(layer.index, q, sequences, key.rows_each, attended)
                added = layer.behind(attended.view(rows, -1), residual)
            assert added is not None
            torch.add(residual, added, out=hidden)
            if key.draws is not DrawKind.NONE:
                self._draw(hidden, tensors, key.draws)

        return body

    # -- graphs between attentions ---------------------------------------------------------------

    def _partial(
        self, graphs: GraphCache, key: GraphKey, rows: StepRows, draws: StepDraws | None
    ) -> tuple[torch.Tensor, StepTensors]:
        self._numbers(key).fill(rows.alone(), None)
        tensors = upload_numbers(self._platform, rows, self._tiles(rows), draws)
        stretch, num_rows = self._stretch, rows.counts.num_rows
        runs = decode_runs(rows, tensors)
        for number in range(len(self._layers) + 1):
            body = self._stretch_body(key, number)
            if not graphs.run(key, body, number):
                body()
            if number < len(self._layers):
                q, out = stretch.q[:num_rows], stretch.attended[:num_rows]
                self._attend(self._layers[number].index, rows, tensors, runs, q, out)
                self._tick()
        return stretch.hidden[:num_rows], tensors

    def _stretch_body(self, key: GraphKey, number: int) -> Callable[[], None]:
        """What lies before attention `number`: the layer below from its attention on, and this one
        up to its own; the first begins with the embedding, the last one ends the step."""
        tensors, stretch, rows = self._numbers(key).tensors, self._stretch, key.num_rows
        # Read from one, written to the other: what was read stays for another run.
        source, residual = (side[:rows] for side in stretch.sides(number))
        angles = stretch.angles(rows)

        def body() -> None:
            added: torch.Tensor | None = None
            if number == 0:
                residual.copy_(self._embed(tensors))
                for place, found in zip(angles, self._model.angles(tensors.positions), strict=True):
                    place.copy_(found)
            else:
                residual.copy_(source)
                attended = stretch.attended[:rows].view(rows, -1)
                added = self._layers[number - 1].behind(attended, residual)
            if number == len(self._layers):
                assert added is not None
                torch.add(residual, added, out=stretch.hidden[:rows])
                return
            addresses, positions = tensors.row_addresses, tensors.positions
            q = stretch.q[:rows]
            self._layers[number].before(added, residual, angles, addresses, positions, q)

        return body

    def _drop(self, key: Hashable) -> None:
        """A key's graphs were given up: nobody reads its tensors any more."""
        if isinstance(key, GraphKey):
            self._static.pop(key, None)
