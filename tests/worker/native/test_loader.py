"""Model directories: what is read, what is refused, and by what name it is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.models import ABSENT, make_model, write_weights
from xllm.errors import ConfigError, DependencyError
from xllm.worker.execution.loading import LoadedModel, load_model
from xllm.worker.loader.checkpoint import open_checkpoint
from xllm.worker.loader.config import ModelConfig, read_config
from xllm.worker.models.registry import NATIVE_ARCHITECTURES, find_family
from xllm.worker.platform.cpu import CpuPlatform
from xllm.worker.platform.platform import DeviceMemory
from xllm.worker.platform.selection import select_platform

WEIGHTS = "model.safetensors"


def load(directory: Path, dtype: str = "auto") -> LoadedModel:
    return load_model(directory, dtype, select_platform("cpu"), lambda loaded, total: None)


def config_of(directory: Path) -> ModelConfig:
    raw = read_config(directory)
    return find_family(raw.architecture()).read(raw)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS)


def edit_config(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("architecture", NATIVE_ARCHITECTURES)
def test_every_native_architecture_has_a_family(architecture: str) -> None:
    assert callable(find_family(architecture).build)


def test_eos_ids_join_both_files(tmp_path: Path) -> None:
    assert config_of(make_model("qwen2", tmp_path / "a")).eos_ids == (510, 508)
    assert config_of(make_model("llama", tmp_path / "b")).eos_ids == (508, 511, 510)
    assert config_of(make_model("mistral", tmp_path / "c")).eos_ids == (2,)
    directory = make_model("mistral", tmp_path / "d", eos_token_id=[7, 2])
    assert config_of(directory).eos_ids == (2, 7)
    (directory / "generation_config.json").unlink()
    assert config_of(directory).eos_ids == (7, 2)


def test_published_keys_mean_what_the_library_takes_them_for(tmp_path: Path) -> None:
    qwen2 = config_of(make_model("qwen2", tmp_path / "qwen2"))
    assert qwen2.layer_windows == (0, 0, 0)
    assert qwen2.qkv_bias
    assert not qwen2.out_bias
    assert qwen2.tie_word_embeddings
    used = config_of(make_model("qwen2", tmp_path / "used", use_sliding_window=True))
    assert used.layer_windows == (0, 16, 16)
    no_window = {"use_sliding_window": True, "sliding_window": None}
    assert config_of(make_model("qwen2", tmp_path / "null", **no_window)).layer_windows == (0,) * 3
    assert config_of(make_model("mistral", tmp_path / "v3")).layer_windows == (0, 0, 0)
    assert config_of(make_model("mistral-window", tmp_path / "v1")).layer_windows == (24, 24, 24)
    absent = make_model("mistral", tmp_path / "absent", sliding_window=ABSENT)
    assert config_of(absent).layer_windows == (4096,) * 3
    assert config_of(make_model("mistral-nemo", tmp_path / "nemo")).head_dim == 32
    assert config_of(make_model("llama", tmp_path / "llama")).head_dim == 16
    llama2 = config_of(make_model("llama2", tmp_path / "llama2"))
    assert not llama2.tie_word_embeddings
    assert llama2.rope.theta == 10000.0
    assert llama2.num_kv_heads == 4


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert config_of(make_model("qwen2", tmp_path, rope_scaling=yarn)).max_positions == 4096


def test_dtype_is_the_checkpoints_own_unless_asked(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path, dtype="bfloat16")
    assert load(directory).dtype == torch.bfloat16
    assert load(directory, "float32").dtype == torch.float32
    assert load(directory, "float16").dtype == torch.float16
    config = json.loads((directory / "config.json").read_text())
    del config["torch_dtype"]
    (directory / "config.json").write_text(json.dumps(config))
    assert load(directory).dtype == torch.bfloat16
    edit_config(directory, dtype="float16")
    assert load(directory).dtype == torch.float32  # on a CPU, which is slow with float16
    with pytest.raises(ConfigError, match="not 'float64'"):
        load(make_model("qwen3", tmp_path / "wide", dtype="float64"))


def test_progress_counts_the_checkpoints_bytes(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path, shards=2)
    calls: list[tuple[int, int]] = []
    load_model(
        directory,
        "auto",
        select_platform("cpu"),
        lambda loaded, total: calls.append((loaded, total)),
    )
    total = open_checkpoint(directory).total_bytes
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert [loaded for loaded, _ in calls] == sorted({loaded for loaded, _ in calls})


def test_sharded_equals_single(tmp_path: Path) -> None:
    single = load(make_model("llama", tmp_path / "one"))
    sharded = load(make_model("llama", tmp_path / "two", shards=3))
    ids = torch.arange(20)
    assert torch.equal(single.model.embed(ids), sharded.model.embed(ids))
    hidden = torch.randn(4, 64)
    assert torch.equal(single.model.head(hidden), sharded.model.head(hidden))
    assert single.revision == sharded.revision


def test_tied_checkpoints_may_hold_either_name_or_both(tmp_path: Path) -> None:
    directory = make_model("qwen2", tmp_path)
    hidden = torch.randn(3, 64)
    want = load(directory).model.head(hidden)

    def add_equal(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    rewrite(directory, add_equal)
    both = load(directory)
    assert both.model.config.tie_word_embeddings
    assert torch.equal(both.model.head(hidden), want)
    rewrite(directory, lambda weights: weights.pop("model.embed_tokens.weight"))
    assert torch.equal(load(directory).model.head(hidden), want)


def test_a_tie_flag_that_the_file_contradicts_is_not_believed(tmp_path: Path) -> None:
    """As transformers has it: two different matrices are two, whatever the flag says."""
    directory = make_model("qwen3", tmp_path)
    want = load(directory).model.head(torch.ones(1, 64))
    edit_config(directory, tie_word_embeddings=True)
    found = load(directory)
    assert not found.model.config.tie_word_embeddings
    assert torch.equal(found.model.head(torch.ones(1, 64)), want)


def test_old_rotary_tables_are_left_out(tmp_path: Path) -> None:
    directory = make_model("llama2", tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(directory, lambda weights: weights.update({name: torch.ones(8)}))
    assert load(directory).model.config.num_layers == 3


def test_the_revision_tells_models_apart(tmp_path: Path) -> None:
    one = load(make_model("qwen3", tmp_path / "one")).revision
    assert load(make_model("qwen3", tmp_path / "same")).revision == one
    tuned = make_model("qwen3", tmp_path / "tuned", seed=1)
    assert load(tuned).revision != one
    config = make_model("qwen3", tmp_path / "config", rope_theta=5000.0)
    assert load(config).revision != one


def drop(name: str) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, lambda weights: weights.pop(name))


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    return lambda directory: rewrite(
        directory, lambda weights: weights.update({name: torch.zeros(shape, dtype=dtype)})
    )


def configure(**values: object) -> Callable[[Path], None]:
    return lambda directory: edit_config(directory, **values)


def cut(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:-100])


def garble(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"\xff" * 64)


def lengthen(directory: Path) -> None:
    """Bytes of no tensor behind the last one."""
    with (directory / WEIGHTS).open("ab") as file:
        file.write(bytes(100))


def nest(directory: Path) -> None:
    header = b"[" * 200_000
    (directory / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)


def nest_config(directory: Path) -> None:
    (directory / "config.json").write_text('{"a":' + "[" * 200_000)


def pickle_weights(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def point_outside(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    write_weights(directory, weights, shards=2)
    index = directory / "model.safetensors.index.json"
    text = index.read_text().replace("model-00001-of", "../model-00001-of")
    index.write_text(text)


def misplace(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    write_weights(directory, weights, shards=2)
    index = directory / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    values["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(values))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing tensor": (drop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up"),
    "a head without tie": (drop("lm_head.weight"), "lacks lm_head.weight"),
    "an unexpected tensor": (put("model.layers.0.extra.weight", 4), "model.layers.0.extra.weight"),
    "a wrong shape": (put("model.norm.weight", 63), r"model.norm.weight has shape \[63\]"),
    "an integer tensor": (
        put("model.norm.weight", 64, dtype=torch.int8),
        "model.norm.weight has type I8",
    ),
    "a layer too many": (configure(num_hidden_layers=4), r"lacks model.layers.3.* and \d+ more"),
    "a cut file": (cut, "does not lie in the file"),
    "a broken file": (garble, "broken safetensors file"),
    "bytes of no tensor": (lengthen, "model.safetensors: broken safetensors file"),
    "a header too deep": (nest, "broken safetensors header"),
    "a configuration too deep": (nest_config, "config.json cannot be read"),
    "pickled weights": (pickle_weights, "pytorch_model.bin: pickled weights"),
    "a shard elsewhere": (point_outside, "is no safetensors file beside it"),
    "a wrong index": (misplace, "it is not there"),
    "remote code": (configure(auto_map={"AutoModel": "modeling.X"}), "auto_map"),
    "quantized weights": (configure(quantization_config={"bits": 4}), "quantization_config"),
    "an unknown architecture": (configure(architectures=["GPT9"]), "architecture 'GPT9'"),
    "no architecture": (configure(architectures=None), "architectures must be"),
    "another activation": (configure(hidden_act="gelu"), "hidden_act 'gelu'"),
    "a text for a size": (configure(hidden_size="64"), "hidden_size must be an integer"),
    "a negative size": (configure(num_hidden_layers=-1), "num_hidden_layers must be an integer"),
    "uneven heads": (configure(num_key_value_heads=3), "no multiple of num_key_value_heads 3"),
    "an odd head": (configure(head_dim=31), "head_dim 31 must be even"),
    "unknown scaling": (configure(rope_scaling={"rope_type": "longrope"}), "'longrope'"),
    "scaling without factor": (configure(rope_scaling={"type": "linear"}), "lacks factor"),
    "partial rotation": (configure(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "an eos that is no id": (configure(eos_token_id="x"), "eos_token_id: 'x' is no id"),
    "a flag that is none": (configure(tie_word_embeddings="no"), "must be true or false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_name(name: str, tmp_path: Path) -> None:
    spoil, words = REFUSED[name]
    directory = make_model("qwen3", tmp_path)
    load(directory)
    spoil(directory)
    with pytest.raises(ConfigError, match=words):
        load(directory)


def test_what_is_absent_is_a_dependency_error(tmp_path: Path) -> None:
    with pytest.raises(DependencyError, match="is no directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(DependencyError, match=r"has no config\.json"):
        load(tmp_path)
    directory = make_model("qwen3", tmp_path / "model", shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DependencyError, match="model-00002-of-00002"):
        load(directory)
    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(DependencyError, match="has neither"):
        load(directory)


def test_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path)
    (directory / "config.json").write_text("[1, 2")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        load(directory)
    (directory / "config.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        load(directory)


class SmallPlatform(CpuPlatform):
    """A machine with 100 KB."""

    def memory(self) -> DeviceMemory:
        return DeviceMemory(100_000, 100_000)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    directory = make_model("qwen3", tmp_path)
    calls: list[int] = []
    with pytest.raises(DependencyError, match=r"the weights take \d+ bytes .* 100000 are free"):
        load_model(directory, "auto", SmallPlatform(), lambda loaded, total: calls.append(loaded))
    assert calls == []
