"""What can be known to be wrong before any process starts, so that it is said at once.

Each role checks its own again: this saves seconds, not safety.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from xllm.config.exposure import check_exposure
from xllm.config.settings import Settings
from xllm.errors import DependencyError
from xllm.protocol.registry.etcd_address import is_etcd, parse_etcd_address
from xllm.protocol.registry.etcd_files import check_etcd_settings
from xllm.protocol.registry.open import split_address
from xllm.protocol.transport.security import Security
from xllm.router.admission.limits_file import make_gate
from xllm.router.http.auth import read_key_file

_CUDA_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg")


def check_settings(settings: Settings) -> None:
    """ConfigError for addresses without keys, and for files of keys or of tenants' limits that
    cannot be used."""
    check_exposure(settings)
    if settings.router.api_key_file:
        read_key_file(settings.router.api_key_file)
    make_gate(settings.admission)
    if settings.cluster.keys_dir:
        Security.load(settings.cluster.keys_dir)
    if settings.cluster.registry:
        split_address(settings.cluster.registry)
    if is_etcd(settings.cluster.registry):
        check_etcd_settings(parse_etcd_address(settings.cluster.registry), settings.etcd)


def check_device(settings: Settings) -> None:
    """DependencyError where the device that was asked for cannot be there."""
    if settings.worker.engine != "native":
        return
    device = settings.worker.device
    if device == "npu" and importlib.util.find_spec("torch_npu") is None:
        raise DependencyError(
            "worker.device is npu, but the package torch_npu is not installed: "
            'pip install ".[npu]" in the directory of xLLM',
            param="worker.device",
        )
    if device == "cuda" and not any(map(os.path.exists, _CUDA_DEVICES)):
        raise DependencyError(
            "worker.device is cuda, but this machine has no GPU or no driver for it",
            param="worker.device",
        )


def check_model_files(settings: Settings) -> None:
    """DependencyError where the (resolved) model directory lacks what every model has, or where
    its tokenizer or chat template cannot be used."""
    directory = Path(settings.model.path)
    missing = []
    if not (directory / "tokenizer.json").is_file():
        missing.append("tokenizer.json")
    if settings.worker.engine == "native" and not any(directory.glob("*.safetensors")):
        missing.append("weights as *.safetensors")
    if missing:
        raise DependencyError(f"{directory} has no {' and no '.join(missing)}", param="model.path")
    from xllm.router.text.model import load_text_model  # tokenizers: not for `--help`

    load_text_model(settings.model.path)
