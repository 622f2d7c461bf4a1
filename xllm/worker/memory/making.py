"""The KV memory and the slots of a loaded model, sized by the settings or by what is left."""

from __future__ import annotations

import dataclasses

import structlog
import torch

from xllm.config.settings import Settings
from xllm.errors import ConfigError, DependencyError, EngineError
from xllm.worker.graphs.footprint import NO_GRAPHS, GraphFootprint
from xllm.worker.loader.config import ModelConfig
from xllm.worker.memory.block_layout import BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.device_layout import DeviceLayout, choose_block_size
from xllm.worker.memory.device_memory import DeviceKvMemory
from xllm.worker.memory.kv_memory import KvMemory
from xllm.worker.memory.layout import KvLayout, choose_num_blocks
from xllm.worker.memory.plan import step_bytes
from xllm.worker.memory.pool import KvPool, allocate_memory
from xllm.worker.memory.rounded import SCALE_BYTES
from xllm.worker.memory.sharing import SharedPages
from xllm.worker.memory.slots import SlotSpace
from xllm.worker.memory.virtual import CpuVirtualMemory, VirtualMemory, available_mappings
from xllm.worker.platform.device_driver import DeviceDriver
from xllm.worker.platform.platform import Platform

log = structlog.get_logger(__name__)

_SLOTS_A_SEQUENCE = 2
"""Idle slots keep what was mapped for others: as many of them as run."""

_MAX_RESERVED_BYTES = 1 << 44
"""Addresses are plenty, not endless: a process has 1 << 47."""


def make_memory(
    settings: Settings,
    config: ModelConfig,
    dtype: torch.dtype,
    platform: Platform,
    max_model_len: int,
    shared: SharedPages | None = None,
    found: FoundBlock | None = None,
    graphs: GraphFootprint = NO_GRAPHS,
) -> KvMemory:
    """The blocks of a loaded model that computes in `dtype`, in its own memory or in one that
    others share. `found`: how they lie, where that is known already; `graphs`: what is to be left
    to them. ConfigError where the settings cannot be met."""
    found = found or find_block(settings, config, dtype, platform)
    one, driver = found.one, found.driver
    on_cpu = isinstance(one, BlockLayout)
    if settings.worker.kv_dtype == "int8":
        dtype = torch.int8
    asked, device = settings.worker.kv_cache_bytes, platform.memory()
    # A CPU's memory is made real by use: what is not there would end the process in service.
    there = device.free_bytes if on_cpu else device.total_bytes
    if asked > there:
        raise ConfigError(
            f"worker.kv_cache_bytes: {asked} bytes were asked for, the device has {there}"
            + (f" free of {device.total_bytes}" if on_cpu else ""),
            param="worker.kv_cache_bytes",
        )
    if shared is not None:
        assert isinstance(one, BlockLayout)
        try:
            return shared.memory(one, dtype, asked, platform.kv_budget())
        except OSError as error:
            raise _unobtainable("the memory", error) from error
    shares_host = on_cpu and settings.master.spawn_workers
    budget = platform.kv_budget() // (settings.master.num_workers if shares_host else 1)
    if not on_cpu:
        # Steps must have what they take, however small the device is.
        left = platform.memory().free_bytes
        activations, held = step_bytes(settings, config, dtype.itemsize, platform, graphs)
        left -= activations + graphs.missing_bytes(held)
        budget = min(budget, max(left, 0))
    num_blocks = choose_num_blocks(
        asked_bytes=asked,
        budget_bytes=budget,
        bytes_per_block=one.block_bytes,
        block_size=one.block_size,
        max_num_seqs=settings.scheduler.max_num_seqs,
        max_model_len=max_model_len,
    )
    layout = dataclasses.replace(one, num_blocks=num_blocks)
    try:
        if isinstance(layout, BlockLayout):
            return CpuKvMemory(layout, dtype)
        if isinstance(layout, DeviceLayout):
            assert driver is not None
            return DeviceKvMemory(layout, dtype, driver)
        return KvPool(layout, allocate_memory(layout, dtype, platform.device))
    except (OSError, RuntimeError, EngineError) as error:
        raise _unobtainable(f"{layout.total_bytes} bytes", error) from error


@dataclasses.dataclass(frozen=True, slots=True)
class FoundBlock:
    """How one block of a model lies on its platform, and what maps it where there is virtual
    memory that is not a CPU's."""

    one: BlockLayout | DeviceLayout | KvLayout
    driver: DeviceDriver | None


def find_block(
    settings: Settings, config: ModelConfig, dtype: torch.dtype, platform: Platform
) -> FoundBlock:
    """Of a model that computes in `dtype`."""
    if settings.worker.kv_dtype == "int8":
        dtype = torch.int8
    driver = _find_driver(settings, platform)
    if driver is None and platform.device.type == "cpu":
        return FoundBlock(one_block(settings, config, dtype), None)
    return FoundBlock(_device_block(settings, config, dtype, driver), driver)


def one_block(settings: Settings, config: ModelConfig, dtype: torch.dtype) -> BlockLayout:
    """The smallest block of a model on a CPU, whose numbers are kept as the settings say."""
    if settings.worker.kv_dtype == "int8":
        dtype = torch.int8
    return BlockLayout(
        1,
        settings.worker.host_block_size,
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        dtype.itemsize,
        SCALE_BYTES if dtype == torch.int8 else 0,
    )


def _device_block(
    settings: Settings, config: ModelConfig, dtype: torch.dtype, driver: DeviceDriver | None
) -> DeviceLayout | KvLayout:
    """A block of a model on a device, with virtual memory or without."""
    heads, dim = config.num_kv_heads, config.head_dim
    shape = (config.num_layers, heads, dim, dtype.itemsize)
    if driver is None:
        return KvLayout(1, settings.worker.host_block_size, *shape)
    token_bytes = 2 * config.num_layers * heads * dim * dtype.itemsize
    asked = settings.worker.block_size
    size = asked or choose_block_size(token_bytes, driver.granularity)
    return DeviceLayout(1, size, *shape, driver.granularity)


def _find_driver(settings: Settings, platform: Platform) -> DeviceDriver | None:
    """Of the platform's virtual memory; None where there is none or it is not wanted, or cannot be
    had, which a line in the log then says."""
    if settings.worker.kv_memory != "xtensor":
        return None
    try:
        return platform.virtual_driver()
    except (EngineError, DependencyError) as error:
        log.warning("kv_slots_not_used", reason=error.message)
        return None


def check_shareable(platform: Platform) -> None:
    """ConfigError where models cannot share a memory."""
    if platform.device.type != "cpu":
        raise ConfigError(
            f"model.more: several models share the memory of a CPU, not of {platform.name}",
            param="model.more",
        )


def _unobtainable(what: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"worker.kv_cache_bytes: {what} cannot be allocated: {error}",
        param="worker.kv_cache_bytes",
    )


def make_slots(
    settings: Settings, memory: KvMemory, max_model_len: int, num_models: int = 1
) -> SlotSpace | None:
    """Slots over a memory, for one of so many models; None where the settings or the device want
    block tables, or where not even the longest sequence could be mapped, which a line in the log
    then says."""
    if settings.worker.kv_memory != "xtensor":
        return None
    if not isinstance(memory, (CpuKvMemory, DeviceKvMemory)):
        return None
    layout = memory.layout
    pages_per_slot = -(-max_model_len // layout.block_size)
    fitting = _MAX_RESERVED_BYTES // (pages_per_slot * layout.block_bytes)
    num_slots = min(_SLOTS_A_SEQUENCE * settings.scheduler.max_num_seqs, fitting)
    on_cpu = isinstance(memory, CpuKvMemory)
    reason = _obstacle(num_slots, pages_per_slot, num_models if on_cpu else 0)
    if not reason:
        try:
            space = _open_slots(memory, num_slots, pages_per_slot)
        except EngineError as error:
            reason = error.message  # addresses have a limit (ulimit -v), or what is mapped has
        else:
            log.info(
                "kv_slots",
                num_slots=num_slots,
                pages_per_slot=pages_per_slot,
                page_bytes=layout.block_bytes,
                page_tokens=layout.block_size,
                wasted_bytes_a_page=layout.wasted_bytes,
            )
            return space
    log.warning("kv_slots_not_used", reason=reason)
    return None


def _open_slots(
    memory: CpuKvMemory | DeviceKvMemory, num_slots: int, pages_per_slot: int
) -> SlotSpace:
    """EngineError where there are no such addresses, or a block cannot be mapped a second time."""
    on_device = isinstance(memory, DeviceKvMemory)
    virtual: VirtualMemory
    if isinstance(memory, DeviceKvMemory):
        virtual = memory.slot_memory()
    else:
        virtual = CpuVirtualMemory(memory.fd)
    try:
        space = SlotSpace(
            virtual,
            num_slots=num_slots,
            pages_per_slot=pages_per_slot,
            page_bytes=memory.layout.block_bytes,
            num_pages=memory.layout.num_blocks,
        )
        if on_device:
            # Tried here rather than in service: every block is mapped in the pool's range, too.
            space.map(0, 0, (0,))
            space.unmap(0)
    except EngineError:
        virtual.close()
        raise
    return space


def max_mappings(space: SlotSpace, memory: KvMemory, num_models: int) -> int:
    """How many mappings the master may count under the slots: on a device as many as it likes, on
    a CPU what the system leaves to each of the models of this process, which share it evenly."""
    if isinstance(memory, DeviceKvMemory):
        return space.num_slots * (space.pages_per_slot + 1)
    return mappings_each(num_models)


def mappings_each(num_models: int) -> int:
    """Mappings that each of the models of this process may have, which share them evenly."""
    return available_mappings() // num_models


def _obstacle(num_slots: int, pages_per_slot: int, num_models: int) -> str:
    """Why there can be no slots of so many pages; empty if there can. `num_models`: who shares the
    process's mappings; 0: they are no process's."""
    if num_slots < 1:
        return f"the longest sequence takes more than {_MAX_RESERVED_BYTES} bytes of addresses"
    num_left = mappings_each(num_models) if num_models else pages_per_slot + 2
    if num_left < pages_per_slot + 2:
        return (
            f"the longest sequence may take {pages_per_slot + 2} mappings, the system allows "
            f"{num_left} more (vm.max_map_count)"
        )
    return ""
