"""The settings of every role: one section a dataclass, each in a file of its own.

A setting is named `section.field`: flag `--section-field`, variable `XLLM_SECTION_FIELD`, key
`field` of table `[section]` in the TOML file. `load` merges them and checks the bounds.
"""

from __future__ import annotations

import dataclasses

from xllm.config.admission import AdmissionSettings
from xllm.config.chaos import ChaosSettings
from xllm.config.cluster import ClusterSettings
from xllm.config.etcd import EtcdSettings
from xllm.config.kv_index import KvIndexSettings
from xllm.config.kvcache import KvCacheSettings
from xllm.config.master import MasterSettings
from xllm.config.router import RouterSettings
from xllm.config.routing import RoutingSettings
from xllm.config.scheduling import SchedulerSettings
from xllm.config.serve import ServeSettings
from xllm.config.served_model import ModelSettings
from xllm.config.worker import WorkerSettings


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a process."""

    cluster: ClusterSettings = dataclasses.field(default_factory=ClusterSettings)
    etcd: EtcdSettings = dataclasses.field(default_factory=EtcdSettings)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    router: RouterSettings = dataclasses.field(default_factory=RouterSettings)
    admission: AdmissionSettings = dataclasses.field(default_factory=AdmissionSettings)
    routing: RoutingSettings = dataclasses.field(default_factory=RoutingSettings)
    scheduler: SchedulerSettings = dataclasses.field(default_factory=SchedulerSettings)
    master: MasterSettings = dataclasses.field(default_factory=MasterSettings)
    worker: WorkerSettings = dataclasses.field(default_factory=WorkerSettings)
    kvcache: KvCacheSettings = dataclasses.field(default_factory=KvCacheSettings)
    kv_index: KvIndexSettings = dataclasses.field(default_factory=KvIndexSettings)
    serve: ServeSettings = dataclasses.field(default_factory=ServeSettings)
    chaos: ChaosSettings = dataclasses.field(default_factory=ChaosSettings)
