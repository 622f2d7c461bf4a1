"""The KV memory and the slots of a loaded model, sized by the settings or by what is left."""

from __future__ import annotations

import dataclasses

import structlog
import torch

from xllm.config.settings import Settings
from xllm.errors import ConfigError, EngineError
from xllm.worker.loader.config import ModelConfig
from xllm.worker.memory.block_layout import RUN_TOKENS, BlockLayout
from xllm.worker.memory.cpu_memory import CpuKvMemory
from xllm.worker.memory.kv_memory import KvMemory
from xllm.worker.memory.layout import KvLayout, choose_num_blocks
from xllm.worker.memory.pool import KvPool, allocate_memory
from xllm.worker.memory.rounded import SCALE_BYTES
from xllm.worker.memory.sharing import SharedPages
from xllm.worker.memory.slots import SlotSpace
from xllm.worker.memory.virtual import CpuVirtualMemory, available_mappings
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
) -> KvMemory:
    """The blocks of a loaded model that computes in `dtype`, in its own memory or in one that
    others share. ConfigError where the settings cannot be met."""
    size = settings.worker.block_size
    on_cpu = platform.device.type == "cpu"
    _check_block_size(size, on_cpu)
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
        block = one_block(settings, config, dtype)
        try:
            return shared.memory(block, dtype, asked, platform.kv_budget())
        except OSError as error:
            raise _unobtainable("the memory", error) from error
    shares_host = on_cpu and settings.master.spawn_workers
    shape = (size, config.num_layers, config.num_kv_heads, config.head_dim, dtype.itemsize)

    def lay_out(num_blocks: int) -> BlockLayout | KvLayout:
        if on_cpu:
            return dataclasses.replace(one_block(settings, config, dtype), num_blocks=num_blocks)
        return KvLayout(num_blocks, *shape)

    num_blocks = choose_num_blocks(
        asked_bytes=asked,
        budget_bytes=platform.kv_budget() // (settings.master.num_workers if shares_host else 1),
        bytes_per_block=lay_out(1).block_bytes,
        block_size=size,
        max_num_seqs=settings.scheduler.max_num_seqs,
        max_model_len=max_model_len,
    )
    layout = lay_out(num_blocks)
    try:
        if isinstance(layout, BlockLayout):
            return CpuKvMemory(layout, dtype)
        return KvPool(layout, allocate_memory(layout, dtype, platform.device))
    except (OSError, RuntimeError) as error:
        raise _unobtainable(f"{layout.total_bytes} bytes", error) from error


def one_block(settings: Settings, config: ModelConfig, dtype: torch.dtype) -> BlockLayout:
    """The smallest block of a model on a CPU, whose numbers are kept as the settings say."""
    if settings.worker.kv_dtype == "int8":
        dtype = torch.int8
    return BlockLayout(
        1,
        settings.worker.block_size,
        config.num_layers,
        config.num_kv_heads,
        config.head_dim,
        dtype.itemsize,
        SCALE_BYTES if dtype == torch.int8 else 0,
    )


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
    if settings.worker.kv_memory != "xtensor" or not isinstance(memory, CpuKvMemory):
        return None
    layout = memory.layout
    pages_per_slot = -(-max_model_len // layout.block_size)
    fitting = _MAX_RESERVED_BYTES // (pages_per_slot * layout.block_bytes)
    num_slots = min(_SLOTS_A_SEQUENCE * settings.scheduler.max_num_seqs, fitting)
    reason = _obstacle(num_slots, pages_per_slot, num_models)
    if not reason:
        try:
            space = SlotSpace(
                CpuVirtualMemory(memory.fd),
                num_slots=num_slots,
                pages_per_slot=pages_per_slot,
                page_bytes=layout.block_bytes,
                num_pages=layout.num_blocks,
            )
        except EngineError as error:
            reason = error.message  # the system limits addresses (ulimit -v)
        else:
            log.info(
                "kv_slots",
                num_slots=num_slots,
                pages_per_slot=pages_per_slot,
                page_bytes=layout.block_bytes,
                wasted_bytes_a_page=layout.wasted_bytes,
            )
            return space
    log.warning("kv_slots_not_used", reason=reason)
    return None


def mappings_each(num_models: int) -> int:
    """Mappings that each of the models of this process may have, which share them evenly."""
    return available_mappings() // num_models


def _obstacle(num_slots: int, pages_per_slot: int, num_models: int) -> str:
    """Why there can be no slots of so many pages; empty if there can."""
    if num_slots < 1:
        return f"the longest sequence takes more than {_MAX_RESERVED_BYTES} bytes of addresses"
    num_left = mappings_each(num_models)
    if num_left < pages_per_slot + 2:
        return (
            f"the longest sequence may take {pages_per_slot + 2} mappings, the system allows "
            f"{num_left} more (vm.max_map_count)"
        )
    return ""


def _check_block_size(size: int, on_cpu: bool) -> None:
    least = RUN_TOKENS if on_cpu else 1
    if size < least or size & (size - 1):
        raise ConfigError(
            f"worker.block_size must be a power of two, at least {least} on this device, not "
            f"{size}",
            param="worker.block_size",
        )
