"""Launches the steps of one model on its device: layers, head, draw, and the copy of the tokens.

A step begins while the one before it runs: its tokens come from where that one draws them. Steps
whose draws need what only the host knows (penalties, biases, log-probabilities, several choices)
or whose rows have no slot give way to the host; they are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from xllm.errors import DeviceLostError
from xllm.protocol.step import MapPages
from xllm.worker.execution.batch import BatchEntry, StepBatch
from xllm.worker.execution.device.draws import DrawnTokens, StepDraws
from xllm.worker.execution.device.ops import DeviceDraws
from xllm.worker.execution.device.rows import decodes_first, has_addresses, lay_out_rows
from xllm.worker.execution.device.runner import DeviceRunner
from xllm.worker.execution.device.under_way import MAX_UNDER_WAY, StepsUnderWay, StepUnderWay
from xllm.worker.execution.drawing import sample_row
from xllm.worker.execution.outputs import StepOutputs
from xllm.worker.execution.sequences import SequenceTable
from xllm.worker.graphs.cache import GraphStatistics
from xllm.worker.graphs.choice import DrawKind, GraphMode
from xllm.worker.graphs.footprint import GraphFootprint
from xllm.worker.platform.copies import HostCopier
from xllm.worker.platform.platform import Platform
from xllm.worker.sampling.edits import needs_counts
from xllm.worker.sampling.rows import SampleRow


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """Steps by how their layers were launched; those whose graph drew, too; those that waited for
    the ones before them, as the host had to draw or their pages were in use; what became of graphs,
    where there are any."""

    by_mode: dict[GraphMode, int]
    num_drawn_whole: int
    num_host_draws: int
    num_waited: int
    graphs: GraphStatistics | None


class DeviceSteps:
    """The steps of one engine. Used by the engine's thread; what it launches is waited for by
    another."""

    def __init__(
        self,
        runner: DeviceRunner,
        sampler: DeviceDraws,
        drawn: DrawnTokens,
        platform: Platform,
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._drawn = drawn
        self._platform = platform
        self._copier: HostCopier = platform.copier()
        self.under_way = StepsUnderWay()
        self._num_host_draws = 0
        self._num_waited = 0

    @property
    def footprint(self) -> GraphFootprint:
        """What graphs have taken of the device's memory, and may still take."""
        return self._runner.footprint

    def warm_up(self) -> None:
        """Have kernels compiled and graphs captured before the first request waits for them."""
        with torch.inference_mode():
            self._runner.warm_up()
        self._platform.synchronize()
        self._platform.trim()

    def make_room(self, table: SequenceTable, maps: Sequence[MapPages], block_size: int) -> bool:
        """Settle what is known; wait for the rest where too many are under way, or a plan maps
        other pages where they read. Whether numbers came that are not finite."""
        found = self.under_way.settle(table)
        if len(self.under_way) >= MAX_UNDER_WAY:
            self._num_waited += 1
            found = self.under_way.settle_oldest(table) or found
        touched = self.under_way.needs(block_size)
        is_in_use = any(one.first_page < touched.get(one.slot, 0) for one in maps)
        if is_in_use:
            found = self.wait(table) or found
        return found

    def wait(self, table: SequenceTable) -> bool:
        """Settle all that is under way, waiting for it; see `make_room`."""
        if not len(self.under_way):
            return False
        self._num_waited += 1
        return self.under_way.drain(table)

    def abandon(self) -> None:
        """Wait until nothing runs any more, behind a launch that failed half-way. DeviceLostError
        where the device has failed: nothing will run on it again."""
        try:
            self._platform.synchronize()
        except RuntimeError as error:
            raise DeviceLostError(f"the device is lost: {error}") from error

    def can_run(self, batch: StepBatch) -> bool:
        """Whether the layers of a batch can be launched here."""
        return bool(batch.entries) and has_addresses(batch.spans)

    def can_draw(self, batch: StepBatch) -> bool:
        """Whether all its draws can be launched behind them."""
        if any(entry.item.score_prompt for entry in batch.entries):
            return False
        drawing = [entry for entry in batch.entries if entry.item.num_samples]
        # Counts are of tokens that the host knows.
        if any(needs_counts(entry.state.sampling) for entry in drawing):
            return False
        rows = _sample_rows(drawing)
        return len(rows) <= self._drawn.most and all(map(self._sampler.is_for_device, rows))

    def hidden(self, batch: StepBatch) -> tuple[StepBatch, torch.Tensor]:
        """The last layer's output of a batch whose draws are the host's, and the batch in the
        order of its rows."""
        self._num_host_draws += 1
        ordered = decodes_first(batch)
        return ordered, self._runner.run(lay_out_rows(ordered))

    def launch(self, step: int, batch: StepBatch, outputs: StepOutputs) -> StepUnderWay:
        """Launch a batch that can be run and drawn here."""
        ordered = decodes_first(batch)
        drawing = [entry for entry in ordered.entries if entry.item.num_samples]
        rows = lay_out_rows(ordered)
        place, tokens = self._drawn.next(len(rows.read_rows))
        self._runner.run(rows, self._draws(drawing, place))
        for entry in drawing:
            if entry.is_verified:
                entry.state.is_open = True
            else:
                entry.state.expect(place)
            place += len(entry.draw_rows)
        # Where nothing is drawn some number tells that the step is done.
        copy = self._copier.copy(tokens if drawing else self._drawn.flat[:1])
        found = StepUnderWay(self.under_way, step, ordered.entries, drawing, copy, outputs)
        self.under_way.add(found)
        return found

    def close(self) -> None:
        """Let graphs and copies go; nothing is under way."""
        self._copier.close()
        self._runner.close()

    def statistics(self) -> DeviceStatistics:
        """A snapshot."""
        return DeviceStatistics(
            self._runner.steps_by_mode,
            self._runner.num_drawn_whole,
            self._num_host_draws,
            self._num_waited,
            self._runner.graph_statistics(),
        )

    def _draws(self, entries: Sequence[BatchEntry], first: int) -> StepDraws | None:
        """The draws of some entries, whose tokens go to the places from `first` on."""
        if not entries:
            return None
        rows = _sample_rows(entries)
        inputs = self._sampler.prepare(rows)
        places = np.arange(first, first + len(rows), dtype=np.int64)
        kind = DrawKind.FILTERED if inputs.filtered else DrawKind.PLAIN
        return StepDraws(inputs.numbers.numpy(), places, kind)


def _sample_rows(entries: Sequence[BatchEntry]) -> list[SampleRow]:
    """What the draws of some entries depend on, in order."""
    return [
        sample_row(entry, number) for entry in entries for number in range(len(entry.draw_rows))
    ]
