"""The loop over a model's layers, and the hooks around each.

The executor owns this loop, not the model: what must happen between layers (progress, interrupts,
KV that moves layer by layer) hooks in here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from xllm.worker.attention.paged import AttentionWorkspace, PagedAttention
from xllm.worker.attention.plan import Span, plan_window, write_slots
from xllm.worker.collectives.ranks import OneRank, Ranks
from xllm.worker.execution.rank_loop import (
    FusedBatch,
    MicroBatch,
    TorchBatch,
    run_halves,
    split_spans,
)
from xllm.worker.kernels.attention import KernelAttention, StepArrays
from xllm.worker.kernels.fused import FusedLayer, FusedLayers
from xllm.worker.kernels.team import Team
from xllm.worker.layers.decoder import Attention
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.kv_memory import KvMemory
from xllm.worker.models.model import NativeModel, WholeModel


class LayerHook(Protocol):
    """Called around each layer, on the engine's thread. Raising ends the step."""

    def before_layer(self, index: int) -> None:
        """Layer `index` is about to run."""

    def after_layer(self, index: int, hidden: torch.Tensor) -> None:
        """Layer `index` gave `hidden` [rows, hidden], which the next one may overwrite."""


class LayerLoop:
    """Runs rows through all layers of a model over one pool. `tick` is called after each layer and
    each bounded piece of work inside of one. With a `team`, which counts such pieces itself, the
    compiled kernels do all of a native model's layers, in one call where no hook wants to be called
    between them, and the attention of other models; what each phase of a layer takes is added
    to `phase_ns` then, if given (int64, as kernels.structures.PHASES)."""

    def __init__(
        self,
        model: NativeModel | WholeModel,
        pool: KvMemory,
        dtype: torch.dtype,
        device: torch.device,
        tick: Callable[[], None],
        team: Team | None = None,
        phase_ns: torch.Tensor | None = None,
    ) -> None:
        self._ranks: Ranks = OneRank()
        self._micro_batch_rows = 0
        self._model = model
        self._phase_ns = phase_ns
        self._team = team
        self._pool = pool
        self._dtype = dtype
        self._device = device
        self._tick = tick
        self._workspace = AttentionWorkspace(pool, dtype, device)
        self._windows = model.config.layer_windows
        self._fused: list[FusedLayer] | None = None
        self._together: tuple[FusedLayers, FusedLayers] | None = None
        self.batch_invariant = False
        """Whether a row's bits do not depend on the rows beside it, nor on their count where the
        team keeps to one variant."""
        parts = None if isinstance(model, WholeModel) else model.parts()
        if team is not None and parts is not None and isinstance(pool, CpuKvMemory):
            step_bytes = pool.layout.layer_bytes
            self._fused = [
                FusedLayer(team, part, index, self._windows[index], step_bytes)
                for index, part in enumerate(parts)
            ]
            self._together = (
                FusedLayers(team, self._fused),
                FusedLayers(team, self._fused[:-1]),
            )
            self.batch_invariant = True

    def share(self, ranks: Ranks, micro_batch_rows: int) -> None:
        """From now on the layers are computed with other ranks, which sum their parts; see
        `WorkerSettings.micro_batch_rows`."""
        self._ranks = ranks
        self._micro_batch_rows = micro_batch_rows

    def run(
        self,
        spans: Sequence[Span],
        token_ids: Sequence[int],
        hooks: Sequence[LayerHook],
        read: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The last layer's output [rows, hidden] of the rows of `spans`, whose tokens are
        `token_ids`, one a row; their keys and values are in the pool then. `read`: the rows that
        anybody reads, ascending; the last layer may leave the others half done. None: all."""
        positions = [p for span in spans for p in range(span.start, span.end)]
        places = self._index(token_ids), self._index(positions)
        if self._ranks.size > 1:
            return self._by_ranks(self._ranks, spans, *places, hooks)
        if self._fused is not None:
            return self._through_fused(self._fused, spans, *places, hooks, read)
        return self._through_layers(*places, self._attention(spans), hooks)

    def _by_ranks(
        self,
        ranks: Ranks,
        spans: Sequence[Span],
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hooks: Sequence[LayerHook],
    ) -> torch.Tensor:
        model = self._model
        assert not isinstance(model, WholeModel)
        hidden = model.embed(token_ids)
        if self._fused is not None:
            hidden = hidden.float()
        batches: list[MicroBatch] = []
        row = 0
        for part in split_spans(spans, self._micro_batch_rows):
            rows = slice(row, row + sum(span.num_rows for span in part))
            batches.append(self._micro_batch(model, part, hidden[rows], positions[rows]))
            row = rows.stop

        def before(index: int) -> None:
            for hook in hooks:
                hook.before_layer(index)

        def after(index: int) -> None:
            self._tick()
            for hook in hooks:
                hook.after_layer(index, hidden)

        run_halves(batches, model.config.num_layers, ranks, before, after)
        return hidden

    def _micro_batch(
        self,
        model: NativeModel,
        spans: Sequence[Span],
        hidden: torch.Tensor,
        positions: torch.Tensor,
    ) -> MicroBatch:
        if self._fused is None:
            return TorchBatch(model, hidden, model.tables(positions), self._attention(spans))
        assert isinstance(self._pool, CpuKvMemory)
        arrays = StepArrays(spans, self._pool, self._phase_ns)
        arrays.set_angles(*model.angles(positions))
        return FusedBatch(self._fused, hidden, arrays)

    def _attention(self, spans: Sequence[Span]) -> Attention:
        pool = self._pool
        if self._team is not None and isinstance(pool, CpuKvMemory):
            return KernelAttention(self._team, pool, spans, self._windows, self._tick)
        size = pool.layout.block_size
        return PagedAttention(
            pool,
            self._workspace,
            self._index(write_slots(spans, size)),
            {
                window: plan_window(spans, window, size, self._dtype, self._device)
                for window in set(self._windows)
            },
            self._windows,
            self._tick,
            None if isinstance(self._model, WholeModel) else self._model.ops,
        )

    def _through_fused(
        self,
        layers: Sequence[FusedLayer],
        spans: Sequence[Span],
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hooks: Sequence[LayerHook],
        read: Sequence[int] | None,
    ) -> torch.Tensor:
        model, pool = self._model, self._pool
        assert not isinstance(model, WholeModel)
        assert isinstance(pool, CpuKvMemory)
        hidden = model.embed(token_ids).float()
        arrays = StepArrays(spans, pool, self._phase_ns)
        arrays.set_angles(*model.angles(positions))
        last = layers[-1]
        is_cut = read is not None and 2 * len(read) <= len(hidden) and last.is_dense
        if not hooks:
            assert self._together is not None
            self._together[is_cut](hidden, arrays)
            if is_cut:
                last.for_rows(hidden, arrays, self._index(read or ()))
            return hidden
        for index, layer in enumerate(layers):
            for hook in hooks:
                hook.before_layer(index)
            if is_cut and layer is last:
                layer.for_rows(hidden, arrays, self._index(read or ()))
            else:
                layer(hidden, arrays)
            for hook in hooks:
                hook.after_layer(index, hidden)
        return hidden

    def _through_layers(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: Attention,
        hooks: Sequence[LayerHook],
    ) -> torch.Tensor:
        def before(index: int) -> None:
            for hook in hooks:
                hook.before_layer(index)

        def after(index: int, hidden: torch.Tensor) -> None:
            self._tick()
            for hook in hooks:
                hook.after_layer(index, hidden)

        model = self._model
        if isinstance(model, WholeModel):
            return model.forward(token_ids, positions, attention, before, after)
        hidden = model.embed(token_ids)
        tables = model.tables(positions)
        for index in range(model.config.num_layers):
            before(index)
            hidden = model.layer(index, hidden, tables, attention)
            after(index, hidden)
        return hidden

    def run_single_rows(
        self, spans: Sequence[Span], token_ids: Sequence[int], hooks: Sequence[LayerHook]
    ) -> torch.Tensor:
        """The same, row by row: a row's shapes, and with them its bits, then depend on its own
        position alone, whatever shares its step and however its prompt was cut."""
        rows = [
            self.run([span], [token], hooks) for span, token in zip(spans, token_ids, strict=True)
        ]
        return torch.cat(rows)

    def warm_up(self, num_rows: int) -> None:
        """Run `num_rows` rows of token 0 through model and head, so that libraries compile
        their kernels before the first request waits for them. Leaves the pool zeroed."""
        size = self._pool.layout.block_size
        num_rows = min(num_rows, self._pool.layout.num_blocks * size)
        span = Span(0, num_rows, array("q", range(-(-num_rows // size))))
        with torch.inference_mode():
            hidden = self.run([span], [0] * num_rows, ())[-1:]
            if self._model.config.has_head:
                self._model.head(hidden)
            else:
                self._model.normalised(hidden)
        self._pool.clear_slots(range(num_rows))

    def _index(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)
