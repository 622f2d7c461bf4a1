"""Attention of a mixed batch over the paged pool, in torch alone.

The blocks that a part of the batch sees are gathered into a workspace and attended by
`scaled_dot_product_attention`, which accumulates its softmax in fp32. The heads of a group share
their keys: in a decode they are the rows of one query, so that nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from xllm.worker.attention.plan import DecodeGroup, FreshGroup, PrefillPart, SeenKeys, WindowPlan
from xllm.worker.memory.kv_memory import KvMemory
from xllm.worker.platform.back_end_ops import BackEndOps


class AttentionWorkspace:
    """Memory for gathered keys and values, kept between steps: fresh memory for each layer of
    each step costs more than the gathering itself."""

    def __init__(self, pool: KvMemory, dtype: torch.dtype, device: torch.device) -> None:
        layout = pool.layout
        self._numbers = layout.block_size * layout.num_kv_heads * layout.head_dim
        self._memory = torch.empty((2, 0, self._numbers), dtype=dtype, device=device)

    def take(self, num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for the keys and the values of blocks, each [num_blocks, block numbers]; valid
        until the next call."""
        if self._memory.shape[1] < num_blocks:
            # Both are let go first: never two at once.
            dtype, device = self._memory.dtype, self._memory.device
            self._memory = torch.empty(0, dtype=dtype, device=device)
            self._memory = torch.empty((2, num_blocks, self._numbers), dtype=dtype, device=device)
        return self._memory[0, :num_blocks], self._memory[1, :num_blocks]


class PagedAttention:
    """The attention of one step: `slots` [rows] say where its keys and values go, `plans` holds
    the plan of each window, `windows` the window of each layer; `tick` is called as the
    attention of a layer begins and after each part of it. `ops` attend where they can."""

    def __init__(
        self,
        pool: KvMemory,
        workspace: AttentionWorkspace,
        slots: torch.Tensor,
        plans: dict[int, WindowPlan],
        windows: tuple[int, ...],
        tick: Callable[[], None],
        ops: BackEndOps | None = None,
    ) -> None:
        self._ops = ops
        self._pool = pool
        self._workspace = workspace
        self._slots = slots
        self._plans = plans
        self._windows = windows
        self._tick = tick
        self._mask: tuple[SeenKeys, torch.Tensor] | None = None
        self._scale: float | None = None
        self._softcap = 0.0

    def tick(self) -> None:
        """A piece of a layer is done."""
        self._tick()

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> torch.Tensor:
        """Write k and v [rows, kv_heads, head_dim] of all rows, then attend q
        [rows, heads, head_dim]: [rows, heads * head_dim]. Rows of one step see each other's
        keys where their block tables share them. `scale`, `softcap`: see layers.decoder."""
        self._scale, self._softcap = scale, softcap
        self._tick()
        self._pool.write(layer, self._slots, k, v)
        plan = self._plans[self._windows[layer]]
        if len(plan.decodes) == 1 and plan.decodes[0].rows is None:
            whole = self._decode(layer, plan.decodes[0], q)
            self._tick()
            return whole
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        for group in plan.decodes:
            assert group.rows is not None
            out[group.rows] = self._decode(layer, group, q[group.rows])
            self._tick()
        for fresh in plan.fresh:
            out[fresh.rows] = self._fresh(fresh, q, k, v)
            self._tick()
        for part in plan.prefills:
            rows = slice(part.first_row, part.first_row + part.num_rows)
            out[rows] = self._prefill(layer, part, q[rows], k[rows], v[rows])
            self._tick()
        return out

    def _gathered(
        self, layer: int, block_ids: torch.Tensor, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of blocks [batch * width] as [batch, kv_heads, tokens, head_dim]."""
        keys, values = self._workspace.take(block_ids.shape[0])
        self._pool.gather(layer, block_ids, keys, values)
        layout = self._pool.layout
        shape = (batch, -1, layout.num_kv_heads, layout.head_dim)
        return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)

    def _decode(self, layer: int, group: DecodeGroup, q: torch.Tensor) -> torch.Tensor:
        keys, values = self._gathered(layer, group.block_ids, group.batch)
        found = self._by_ops(q[:, :, None], keys, values, group.mask)
        if found is not None:
            return found.reshape(group.batch, -1)
        # Heads that share keys become rows: [batch, kv_heads, group, head_dim].
        folded = q.reshape(group.batch, keys.shape[1], -1, keys.shape[3])
        found = self._attended(folded, keys, values, group.mask)
        return found.reshape(group.batch, -1)

    def _fresh(
        self, group: FreshGroup, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """A causal batch, padded behind each prompt's end: no real row sees the padding."""
        q, k, v = (
            x[group.padded].view(group.batch, group.width, *x.shape[1:]).transpose(1, 2)
            for x in (q, k, v)
        )
        found = self._attended(q, k, v, None)
        return found.transpose(1, 2).flatten(2).flatten(0, 1)[group.places]

    def _prefill(
        self, layer: int, part: PrefillPart, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        query = q.transpose(0, 1)[None]
        if part.seen is None:
            found = self._attended(query, k.transpose(0, 1)[None], v.transpose(0, 1)[None], None)
        else:
            keys, values = self._gathered(layer, part.seen.block_ids, 1)
            mask = self._mask_of(part.seen, part.num_rows, q.dtype)
            found = self._attended(query, keys, values, mask)
        return found[0].transpose(0, 1).reshape(part.num_rows, -1)

    def _attended(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention [batch, heads, rows, head_dim] of q over k and v, whose heads q's share;
        without a mask it is causal over as many keys as rows."""
        found = self._by_ops(q, k, v, mask)
        if found is not None:
            return found
        if not self._softcap:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self._scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        return _softcapped(q, k, v, mask, self._scale or q.shape[-1] ** -0.5, self._softcap)

    def _by_ops(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The same by the back-end's operator; None where it cannot. What was gathered is given
        as it lies."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self._ops is None or self._softcap or not self._ops.can_attend(q, k):
            return None
        hidden = None if mask is None else (mask < 0).view(-1, 1, *mask.shape[-2:])
        scale = self._scale or q.shape[-1] ** -0.5
        return self._ops.attend(q, k, v, hidden, scale).transpose(1, 2)

    def _mask_of(self, seen: SeenKeys, num_rows: int, dtype: torch.dtype) -> torch.Tensor:
        """One mask is kept: it serves all layers where a step has a single part."""
        if self._mask is None or self._mask[0] is not seen:
            self._mask = None  # never two at once
            self._mask = seen, seen.mask(num_rows, dtype)
        return self._mask[1]


def _softcapped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores are bent by a tanh (Gemma 2), step by step: fp32 scores stand in
    memory in full. Shapes as in PagedAttention._attended."""
    batch, heads, rows, dim = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    folded = q.reshape(batch, kv_heads, -1, dim)
    scores = (folded @ k.transpose(2, 3)).float().mul_(scale)
    scores = scores.div_(softcap).tanh_().mul_(softcap).view(batch, heads, rows, columns)
    if mask is None:
        hidden = torch.ones((rows, columns), dtype=torch.bool, device=q.device).triu_(1)
        scores.masked_fill_(hidden, float("-inf"))
    else:
        scores += mask
    weights = scores.softmax(dim=-1).to(v.dtype).view(batch, kv_heads, -1, columns)
    return (weights @ v).view(batch, heads, rows, dim)
