"""The router's indices of cached blocks, and what keeps them true.

One index a model, from the heartbeats of its instances, and one of all KV cache daemons, whose
hashes tell models apart by themselves. Each publisher has a follower that asks for a snapshot where
it must; here is only who follows whom, and what requests found. It knows the time by a clock
and no sockets (`kv_listener` has them). Invariant: what an instance has is told by instances'
heartbeats alone, what a daemon has by daemons', though both may bear one name.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import structlog

from xllm.config.kv_index import KvIndexSettings
from xllm.kvcache.follower import FeedFigures, PublisherFollower
from xllm.kvcache.hashing import HASH_BYTES
from xllm.kvcache.index import KvIndex
from xllm.kvcache.index_parts import CachedPrefix
from xllm.protocol.authority import PeerRole
from xllm.protocol.bus import BusMessage, DaemonHeartbeat, InstanceHeartbeat, SnapshotOfBlocks
from xllm.protocol.instance import RequestEnded
from xllm.protocol.records import DaemonRecord, InstanceRecord
from xllm.router.kv_feedback import Promises, SilenceWatch

_log = structlog.get_logger("kv_index")
MAX_OPEN_QUESTIONS = 8
"""Snapshots that are on their way at most: each may be megabytes."""
UNKNOWN_S = 5.0
"""A publisher that is unknown for longer is named in the health report."""
DAEMONS = ""
"""Key of the daemons' index among those of models, whose names are not empty."""
Publisher = tuple[PeerRole, str]
"""MASTER or DAEMON, and the name: one of each may have the same."""


class KvFeed:
    """`clock`: seconds; `random`: for the secret of each index and for jitter."""

    def __init__(
        self,
        settings: KvIndexSettings,
        clock: Callable[[], float],
        randomness: random.Random | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._random = randomness or random.SystemRandom()
        self._indices: dict[str, KvIndex] = {}
        self._followers: dict[Publisher, PublisherFollower] = {}
        self._records: dict[str, InstanceRecord] = {}
        self.figures = FeedFigures()
        self.promises = Promises()
        self.silence = SilenceWatch()

    @property
    def is_on(self) -> bool:
        """Whether there is an index at all."""
        return self._settings.max_bytes > 0

    @property
    def indices(self) -> dict[str, KvIndex]:
        """By model; that of the daemons under DAEMONS."""
        return self._indices

    @property
    def followers(self) -> dict[Publisher, PublisherFollower]:
        """By publisher."""
        return self._followers

    # -- who is there ------------------------------------------------------------------------

    def instance_registered(self, record: InstanceRecord) -> None:
        """An instance, or another incarnation of it, begins with an empty cache."""
        self.gone(PeerRole.MASTER, record.name)
        self._records[record.name] = record
        publisher = PeerRole.MASTER, record.name
        self._follow(publisher, record.incarnation, record.model, "device")

    def daemon_registered(self, record: DaemonRecord) -> None:
        """A daemon, or another incarnation of it; a record that is written again changes
        nothing."""
        publisher = PeerRole.DAEMON, record.name
        known = self._followers.get(publisher)
        if known is None or known.incarnation != record.incarnation:
            self.gone(*publisher)
            self._follow(publisher, record.incarnation, DAEMONS, "dram")

    def gone(self, role: PeerRole, name: str) -> None:
        """A publisher is gone, and what it had. Unknown ones are ignored."""
        follower = self._followers.pop((role, name), None)
        if follower is not None:
            follower.end()
        if role is not PeerRole.MASTER:
            return
        self._records.pop(name, None)
        self.promises.forget(name)
        self.silence.forget(name)

    def _follow(self, publisher: Publisher, incarnation: str, model: str, tier: str) -> None:
        if not self.is_on:
            return
        index = self._indices.get(model)
        if index is None:
            secret = self._random.getrandbits(64) | 1
            index = self._indices[model] = KvIndex(self._settings.max_bytes, secret)
        self._followers[publisher] = PublisherFollower(
            index, publisher[1], incarnation, tier, self.figures, self._jitter
        )

    def _jitter(self) -> float:
        return self._random.random() * self._settings.jitter_ms / 1000

    # -- what they say -----------------------------------------------------------------------

    def heard(self, word: BusMessage) -> None:
        """A word on a publisher's bus; heartbeats of those that are not registered as that are
        ignored."""
        if isinstance(word, InstanceHeartbeat):
            role = PeerRole.MASTER
        elif isinstance(word, DaemonHeartbeat):
            role = PeerRole.DAEMON
        else:
            return
        name = word.publisher
        follower = self._followers.get((role, name))
        if follower is None:
            return
        was_known = follower.is_known
        follower.word(word, self._clock())
        if was_known and not follower.is_known:
            _log.warning("kv_index_unknown", publisher=name, seq=follower.seq, heard=word.seq)
        is_instance = role is PeerRole.MASTER
        if is_instance and self.silence.look(name, self._is_empty(name), word.seq):
            _log.error("kv_events_silent", instance=name)

    def snapshot(self, role: PeerRole, name: str, answer: SnapshotOfBlocks) -> None:
        """A publisher's answer to a question."""
        follower = self._followers.get((role, name))
        if follower is None:
            return
        follower.snapshot(answer, self._clock())
        if follower.is_known:
            num_blocks = len(answer.hashes) // HASH_BYTES
            _log.info("kv_index_resynced", publisher=name, seq=follower.seq, num_blocks=num_blocks)

    def to_ask(self) -> Iterator[Publisher]:
        """Publishers to ask for a snapshot now; `asked` follows each."""
        if not self._followers:
            return
        now = self._clock()
        num_open = sum(one.is_asked(now) for one in self._followers.values())
        for publisher, follower in self._followers.items():
            if num_open >= MAX_OPEN_QUESTIONS:
                return
            if follower.wants_snapshot(now):
                num_open += 1
                yield publisher

    def asked(self, publisher: Publisher, reached: bool) -> None:
        """The question was sent, or could not be."""
        self._followers[publisher].asked(self._clock(), reached)

    # -- requests ----------------------------------------------------------------------------

    def match(self, model: str, hashes: bytes) -> dict[str, CachedPrefix]:
        """How many leading blocks of a prompt each instance of the model, and each daemon, has by
        tier. Who is unknown at present, or has none, is absent, and so is a daemon that bears the
        name of an instance."""
        index, daemons = self._indices.get(model), self._indices.get(DAEMONS)
        found = {} if index is None else index.match(hashes)
        if daemons is not None:
            for name, prefix in daemons.match(hashes).items():
                if (PeerRole.MASTER, name) not in self._followers:
                    found[name] = prefix
        return found

    def placed(self, request_id: str, instance: str, num_blocks: int) -> None:
        """A request goes to an instance that should have so many of its blocks."""
        record = self._records.get(instance)
        if record is not None and self.is_on:
            self.promises.promise(request_id, instance, num_blocks * record.block_size)

    def ended(self, instance: str, word: RequestEnded, num_prompt_tokens: int) -> None:
        """A request ended well there; `num_prompt_tokens`: of its prompt, which gave tokens."""
        record = self._records.get(instance)
        follower = self._followers.get((PeerRole.MASTER, instance))
        if record is None or follower is None:
            return
        if self._is_empty(instance):
            num_blocks = (num_prompt_tokens - word.cached_tokens) // record.block_size
            self.silence.computed(instance, num_blocks, follower.seq)
        found = word.cached_tokens
        is_doubtful = self.promises.found(word.request_id, instance, found, record.block_size)
        if is_doubtful and follower.is_known:
            self.figures.num_distrusted += 1
            _log.warning("kv_index_distrusted", instance=instance)
            follower.doubt(self._clock())

    def _is_empty(self, name: str) -> bool:
        record = self._records.get(name)
        index = self._indices.get(record.model) if record is not None else None
        part = index.part(name, "device") if index is not None else None
        return part is None or not part.num_blocks

    # -- what is amiss -----------------------------------------------------------------------

    @property
    def num_unknown(self) -> int:
        """Publishers that the index does not speak of at present."""
        return sum(not one.is_known for one in self._followers.values())

    def alarms(self) -> tuple[str, ...]:
        """What is not as it should be, in words."""
        now = self._clock()
        parts = [
            f"instance {name} tells nothing of its cache" for name in sorted(self.silence.silent)
        ]
        parts += [
            f"what {name} has cached is unknown"
            for (_, name), one in sorted(self._followers.items())
            if one.unknown_since is not None and now - one.unknown_since > UNKNOWN_S
        ]
        parts += [
            f"the index of {model or 'daemons'} is full"
            for model, index in sorted(self._indices.items())
            if index.is_full
        ]
        return tuple(parts)
