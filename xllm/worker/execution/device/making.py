"""The device steps of a model that was loaded: its layers over our kernels, buffers, graphs."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from xllm.config.scheduling import max_drawn_rows, max_rows_each
from xllm.config.settings import Settings
from xllm.errors import ConfigError
from xllm.worker.execution.device.draws import DeviceDrawing, DrawnTokens
from xllm.worker.execution.device.layer import DeviceLayer
from xllm.worker.execution.device.runner import DeviceRunner
from xllm.worker.execution.device.steps import DeviceSteps
from xllm.worker.execution.device.triton_ops import TritonOps
from xllm.worker.execution.reading import ReadModel
from xllm.worker.graphs.choice import GraphLimits
from xllm.worker.layers.decoder import LayerWeights
from xllm.worker.memory.device_layout import DeviceLayout
from xllm.worker.models.model import NativeModel, WholeModel
from xllm.worker.sampling.device_sampler import DeviceSampler
from xllm.worker.triton_kernels.launching import KERNEL_ERRORS

log = structlog.get_logger(__name__)


def make_device_steps(
    settings: Settings,
    read: ReadModel,
    layout: DeviceLayout,
    model_len: int,
    tick: Callable[[], None],
) -> DeviceSteps | None:
    """Steps of a native model on its platform, with graphs captured for decodes; None where the
    kernels cannot have its weights or its blocks, which a line in the log says. No memory for KV is
    needed: what is warmed up with is nobody's."""
    model = read.loaded.model
    assert not isinstance(model, WholeModel)
    weights = model.weights()
    if weights is None:
        log.warning("device_steps_not_used", reason="the weights are packed")
        return None
    try:
        steps = _build(settings, read, model, weights, layout, model_len, tick)
        steps.warm_up()
    except (ConfigError, *KERNEL_ERRORS) as error:
        log.warning("device_steps_not_used", reason=str(error))
        return None
    return steps


def _build(
    settings: Settings,
    read: ReadModel,
    model: NativeModel,
    weights: list[LayerWeights],
    layout: DeviceLayout,
    model_len: int,
    tick: Callable[[], None],
) -> DeviceSteps:
    platform = read.platform
    config, dtype = model.config, read.loaded.dtype
    ops = TritonOps(config, layout, dtype, model_len)
    layers = [DeviceLayer(index, one, ops) for index, one in enumerate(weights)]
    most = settings.scheduler.max_num_seqs
    draws = max_drawn_rows(settings.scheduler)
    drawn = DrawnTokens(draws, platform.device)
    # Rows of an expert are counted and gathered by the host: no graph holds them.
    has_graphs = model.experts is None
    limits = GraphLimits(
        min(settings.worker.graph_max_batch, most) if has_graphs else 0,
        settings.worker.graph_max_rows if has_graphs else 0,
        max_rows_each=max_rows_each(settings.scheduler),
    )
    sampler = DeviceSampler(config.vocab_size, platform.device, draws)
    drawing = DeviceDrawing(model, sampler, drawn)
    runner = DeviceRunner(model, layers, ops, platform, drawing, dtype, limits, most, tick)
    return DeviceSteps(runner, sampler, drawn, platform)
