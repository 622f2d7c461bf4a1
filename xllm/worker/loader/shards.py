"""Which part of each tensor of a checkpoint a rank holds, and what it computes with it.

Tensor parallelism as in Megatron-LM (Shoeybi et al., 2019): each rank has some heads and some of
the MLP's inner numbers; the products into them are cut by rows (outputs), those out of them by
columns (inputs), so that the ranks' results are parts of a sum. The head is cut by rows of the
vocabulary. The rest is whole on every rank. Names are those of Hugging Face's decoders. Pure.
"""

from __future__ import annotations

import dataclasses

from xllm.errors import ConfigError
from xllm.worker.loader.config import ModelConfig

_ROWS, _COLUMNS = 0, 1


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """The indices [first, first + count) of an axis of `whole`."""

    axis: int
    first: int
    count: int
    whole: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part as an index of the whole tensor."""
        part = slice(self.first, self.first + self.count)
        return (*(slice(None),) * self.axis, part)

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor of which a part has this shape."""
        return (*shape[: self.axis], self.whole, *shape[self.axis + 1 :])


@dataclasses.dataclass(frozen=True, slots=True)
class ShardPlan:
    """Rank `rank` of `size` of a model. Raises ConfigError where it cannot be cut so."""

    config: ModelConfig
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        config, size = self.config, self.size
        sizes = {"num_attention_heads": config.num_heads}
        if config.experts is None or len(config.experts.layers) < config.num_layers:
            sizes["intermediate_size"] = config.intermediate_size
        if config.experts is not None:
            sizes["moe_intermediate_size"] = config.experts.intermediate_size
        for name, number in sizes.items():
            if number % size:
                self._refuse(f"{name} {number} is no multiple")
        if config.num_kv_heads % size and size % config.num_kv_heads:
            self._refuse(f"num_key_value_heads {config.num_kv_heads} is no multiple or divisor")
        if (size - 1) * self.head_rows >= config.vocab_size:
            self._refuse(f"vocab_size {config.vocab_size} is too small")

    @property
    def local(self) -> ModelConfig:
        """The configuration of what this rank computes: its heads and its part of the MLPs. With
        fewer KV heads than ranks, several ranks have the same one."""
        config, size = self.config, self.size
        experts = config.experts
        if experts is not None:
            inner = experts.intermediate_size // size
            experts = dataclasses.replace(experts, intermediate_size=inner)
        return dataclasses.replace(
            config,
            num_heads=config.num_heads // size,
            num_kv_heads=max(config.num_kv_heads // size, 1),
            intermediate_size=config.intermediate_size // size,
            experts=experts,
        )

    @property
    def head_rows(self) -> int:
        """Rows of the vocabulary that a rank's head has; the last rank's may have fewer."""
        return -(-self.config.vocab_size // self.size)

    def head(self) -> Cut:
        """This rank's rows of the head."""
        vocab = self.config.vocab_size
        first = self.rank * self.head_rows
        return Cut(_ROWS, first, min(self.head_rows, vocab - first), vocab)

    def cut(self, name: str) -> Cut | None:
        """The part of a tensor that this rank holds; None: all of it."""
        if self.size == 1:
            return None
        config, dim = self.config, self.config.head_dim
        owner, _, leaf = name.rpartition(".")
        is_bias = leaf == "bias"
        match owner.rpartition(".")[2]:
            case "q_proj":
                return self._even(_ROWS, config.num_heads * dim)
            case "k_proj" | "v_proj":
                first = self.rank * config.num_kv_heads // self.size
                return Cut(
                    _ROWS, first * dim, self.local.num_kv_heads * dim, config.num_kv_heads * dim
                )
            case "gate_proj" | "up_proj":
                return self._even(_ROWS, self._inner(name))
            case "o_proj" if not is_bias:
                return self._even(_COLUMNS, config.num_heads * dim)
            case "lm_head":
                return self.head()
            case "down_proj" if not is_bias:
                return self._even(_COLUMNS, self._inner(name))
        return None

    def is_left_out(self, name: str) -> bool:
        """Whether a tensor counts as zeros here: of the biases of products whose results the ranks
        add up, that of rank 0 is enough."""
        return self.rank > 0 and name.endswith(("o_proj.bias", "down_proj.bias"))

    def _inner(self, name: str) -> int:
        """The inner size of the MLP that a tensor belongs to."""
        experts = self.config.experts
        if experts is not None and ".experts." in name:
            return experts.intermediate_size
        return self.config.intermediate_size

    def _even(self, axis: int, whole: int) -> Cut:
        count = whole // self.size
        return Cut(axis, self.rank * count, count, whole)

    def _refuse(self, reason: str) -> None:
        raise ConfigError(
            f"master.num_workers: the model cannot be cut for {self.size} ranks: {reason}",
            param="master.num_workers",
        )
