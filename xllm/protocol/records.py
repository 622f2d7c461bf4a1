"""What processes register about themselves, under `/xllm/<cluster>/`.

Addresses come from here and never from a request. A record is written under its process's
lease; a new incarnation replaces one that has ended (see registry/holder). `process` says where
its writer can be looked for.
"""

from __future__ import annotations

from xllm.protocol.message import MapPart, learn


class InstanceRecord(MapPart, frozen=True):
    """`instances/<name>`: a master whose workers are ready."""

    name: str
    incarnation: str
    endpoint: str
    bus_endpoint: str
    model: str
    model_path: str
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    eos_ids: tuple[int, ...] = ()
    revision: str = ""
    fingerprint: str = ""
    engine: str = ""
    device: str = ""
    public_key: str = ""
    task: str = "generate"
    """generate or embed: what its model is served for."""
    embedding_size: int = 0
    """Numbers of a vector, where it embeds."""
    max_num_seqs: int = 0
    """Sequences that it runs at once at most; 0: not said."""
    protocol: int = 1
    """Version of the protocol that it speaks; records of before this field are of version 1."""
    process: str = ""


class DaemonRecord(MapPart, frozen=True):
    """`daemons/<name>`: a node's KV cache daemon."""

    name: str
    incarnation: str
    endpoint: str
    bus_endpoint: str
    node: str = ""
    dram_bytes: int = 0
    public_key: str = ""
    protocol: int = 1
    process: str = ""


class RouterRecord(MapPart, frozen=True):
    """`routers/<name>`: where clients and peers reach a router."""

    name: str
    incarnation: str
    zmq_endpoint: str
    http_address: str = ""
    bus_endpoint: str = ""
    public_key: str = ""
    protocol: int = 1
    process: str = ""


class LeaderRecord(MapPart, frozen=True):
    """`leader`: the router that leads. Its epoch is `epoch_base` and the entry's create
    revision."""

    name: str
    incarnation: str
    zmq_endpoint: str = ""
    epoch_base: int = 0


def cluster_prefix(cluster: str) -> str:
    """The root of a cluster's keys."""
    return f"/xllm/{cluster}/"


def instance_key(cluster: str, name: str) -> str:
    """Key of an InstanceRecord."""
    return f"{cluster_prefix(cluster)}instances/{name}"


def daemon_key(cluster: str, name: str) -> str:
    """Key of a DaemonRecord."""
    return f"{cluster_prefix(cluster)}daemons/{name}"


def router_key(cluster: str, name: str) -> str:
    """Key of a RouterRecord."""
    return f"{cluster_prefix(cluster)}routers/{name}"


def leader_key(cluster: str) -> str:
    """Key of the LeaderRecord."""
    return f"{cluster_prefix(cluster)}leader"


def epoch_base_key(cluster: str) -> str:
    """Key of the number that epochs are counted from, in decimal digits: there is one where
    revisions have gone back."""
    return f"{cluster_prefix(cluster)}epoch_base"


def roles_key(cluster: str) -> str:
    """Key of the role table: a JSON object, role by instance."""
    return f"{cluster_prefix(cluster)}roles"


def slo_key(cluster: str) -> str:
    """Key of the live objectives: a JSON object with ttft_ms and tpot_ms."""
    return f"{cluster_prefix(cluster)}slo"


def era_key(cluster: str) -> str:
    """Key of a random name that a leader gives to a registry that has none: a registry that lost
    its data has another one, or none."""
    return f"{cluster_prefix(cluster)}era"


def load_key(cluster: str, name: str) -> str:
    """Key of an instance's mirrored load: a JSON object."""
    return f"{cluster_prefix(cluster)}load/{name}"


def experts_key(cluster: str, name: str) -> str:
    """Key of an instance's mirrored expert-load report."""
    return f"{cluster_prefix(cluster)}experts/{name}"


def kv_key(cluster: str, name: str) -> str:
    """Key of the mirrored digest of an instance's cached blocks."""
    return f"{cluster_prefix(cluster)}kv/{name}"


def secret_key(cluster: str, name: str) -> str:
    """Key of what a kind of processes shares: made by the first that needs it, under no lease."""
    return f"{cluster_prefix(cluster)}secrets/{name}"


learn(InstanceRecord, DaemonRecord, RouterRecord, LeaderRecord)
