"""From a SubmitRequest to what the state machine needs: check, render, encode, hash, once.

Knows the model's text side and facts; no instances, clocks or sinks. `prepare` is the dear part
and may run in a thread: what it shares with others are the model's record, which it reads once,
and caches of which each entry follows from its key alone (roots, segments, pieces of tokens).
Threads may lose an entry of those to each other; they never see a wrong one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec

from xllm.config.router import RouterSettings
from xllm.errors import ContextLengthError, InvalidRequestError, UnavailableError
from xllm.kvcache.hashing import root_hash
from xllm.protocol.generation import ChatMessage, SubmitRequest
from xllm.protocol.questions import ModelInfo, TokenizeText
from xllm.protocol.records import InstanceRecord
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import PACK_FROM, TOKEN_BYTES, pack_tokens, unpack_tokens
from xllm.router.block_names import BlockNames
from xllm.router.embedding import VECTOR_SAMPLING, check_task
from xllm.router.foreign_ids import foreign_id
from xllm.router.front import Tenant
from xllm.router.model_facts import ModelFacts
from xllm.router.state.spec import RequestSpec
from xllm.router.text.model import TextModel
from xllm.router.validation import (
    check_context,
    check_messages,
    check_request,
    check_resumed_length,
    check_text_bytes,
)


class Intake:
    """What one served model accepts."""

    def __init__(self, name: str, text: TextModel, limits: RouterSettings) -> None:
        self.name = name
        self.text = text
        self._limits = limits
        self._record: InstanceRecord | None = None
        self._facts: ModelFacts | None = None
        self._checked: SamplingParams | None = None
        """Passed under these facts."""
        self._roots: dict[tuple[str, bytes], bytes] = {}
        self.block_names = BlockNames(limits.hash_cache_bytes)

    def learn(self, record: InstanceRecord) -> None:
        """An instance of this model registered: its facts bound requests from now on."""
        self._record = record
        self._checked = None
        self._facts = ModelFacts(
            record.max_model_len,
            record.vocab_size,
            self.text.longest_token_bytes,
            record.embedding_size,
        )

    def info(self, ready: bool) -> ModelInfo:
        """The model as clients see it."""
        record = self._record
        if record is None:
            return ModelInfo(name=self.name, max_model_len=0, ready=False)
        return ModelInfo(
            name=self.name,
            max_model_len=record.max_model_len,
            vocab_size=record.vocab_size,
            revision=record.revision,
            ready=ready,
            task=record.task,
            embedding_size=record.embedding_size,
        )

    def check(self, request: SubmitRequest) -> bytes:
        """RequestError for what is out of bounds; UnavailableError before any instance came.
        Returns the bytes of a prompt of ids, which `prepare` need not make again; else none."""
        facts = self._known_facts()
        assert self._record is not None
        check_task(request, self._record.task, self.name)
        packed = check_request(request, self._limits, facts, self._checked)
        self._checked = request.sampling
        return packed

    def _pack(self, request: SubmitRequest, owner: bytes) -> bytes:
        """The prompt's token ids as bytes. `owner`: the salt of the tenant that asks."""
        prompt = request.prompt
        if isinstance(prompt, tuple):
            return pack_tokens(prompt)
        if prompt is not None:
            packed = self.text.pack(prompt, owner=owner)
        else:
            assert request.messages is not None
            packed = self._pack_talk(request.messages, request.chat_template_kwargs, owner)
        if not packed:
            raise InvalidRequestError("the prompt has no tokens", param="prompt")
        return packed

    def prepare(
        self,
        request: SubmitRequest,
        tenant: Tenant,
        request_id: str,
        drawn_seed: int,
        deadline: float,
        packed: bytes = b"",
    ) -> RequestSpec:
        """Encode and hash a request that was checked. `packed`: what `check` returned."""
        record = self._record
        assert record is not None
        salt = self._owner(tenant)
        packed = packed or self._pack(request, salt)
        num_tokens = len(packed) // TOKEN_BYTES
        asked = VECTOR_SAMPLING if request.embed else request.sampling
        max_tokens = check_context(
            num_tokens, asked.max_tokens, asked.min_tokens, record.max_model_len
        )
        seed = asked.seed
        if request.resume is not None:
            seed = request.resume.seed
            check_resumed_length(request.resume, max_tokens)
        sampling = _resolve(asked, drawn_seed if seed is None else seed, max_tokens)
        root = self._root(record.revision, salt, request.cache_salt)
        stop_ids = frozenset(asked.stop_token_ids)
        travels_packed = num_tokens >= PACK_FROM
        prompt_ids: Sequence[int]
        if isinstance(request.prompt, tuple):
            prompt_ids = request.prompt
        else:
            ids = unpack_tokens(packed)
            prompt_ids = ids if travels_packed else tuple(ids)
        return RequestSpec(
            request_id,
            request.id,
            self.name,
            prompt_ids,
            sampling,
            deadline,
            request.stream and not request.embed,
            request.hold_ms / 1000,
            self.block_names.chain(root, packed, record.block_size),
            root,
            request.priority,
            request.offline,
            request.traceparent,
            stop_ids if asked.ignore_eos else stop_ids.union(record.eos_ids),
            tenant.name,
            request.ttft_ms,
            request.tpot_ms,
            request.embed,
            request.dimensions,
            packed if travels_packed else b"",
            request.session,
        )

    def _owner(self, tenant: Tenant) -> bytes:
        """What keeps a tenant's texts and prefixes apart from those of others."""
        return b"" if self._limits.single_tenant else tenant.salt

    def _root(self, revision: str, tenant_salt: bytes, cache_salt: str) -> bytes:
        """The root of a hash chain, remembered for the tenants' own prefixes: those are few."""
        if cache_salt:
            return root_hash(revision, "", _salt(tenant_salt, cache_salt))
        key = (revision, tenant_salt)
        root = self._roots.get(key)
        if root is None:
            root = self._roots[key] = root_hash(revision, "", _salt(tenant_salt, ""))
        return root

    def encode_text(self, request: TokenizeText, tenant: Tenant) -> tuple[int, ...]:
        """The ids that `tokenize` answers with."""
        owner = self._owner(tenant)
        if request.text is not None:
            packed = self.text.pack(request.text, request.add_special_tokens, owner)
        else:
            assert request.messages is not None
            packed = self._pack_talk(request.messages, {}, owner)
        return tuple(unpack_tokens(packed))

    def check_text(self, request: TokenizeText) -> ModelInfo:
        """RequestError for a `tokenize` that is out of bounds."""
        facts = self._known_facts()
        if (request.text is None) == (request.messages is None):
            raise InvalidRequestError("give one of text and messages", param="text")
        if request.text is not None:
            check_text_bytes("text", request.text, facts)
        elif request.messages is not None:
            check_messages(request.messages, facts)
        return self.info(True)

    def check_ids(self, token_ids: tuple[int, ...]) -> None:
        """RequestError for a `detokenize` that is out of bounds."""
        facts = self._known_facts()
        most, size = facts.max_model_len, facts.vocab_size
        if len(token_ids) > most:
            raise ContextLengthError(f"token_ids must be at most {most}", param="token_ids")
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= size):
            raise foreign_id("token_ids", token_ids, size)

    def _known_facts(self) -> ModelFacts:
        if self._facts is None:
            raise UnavailableError("no instance of the model has come up yet")
        return self._facts

    def _pack_talk(
        self, messages: tuple[ChatMessage, ...], kwargs: Mapping[str, object], owner: bytes
    ) -> bytes:
        # The template writes the special tokens itself.
        return self.text.pack(self.text.render(messages, kwargs), False, owner)


def _resolve(asked: SamplingParams, seed: int, max_tokens: int) -> SamplingParams:
    return msgspec.structs.replace(
        asked, seed=seed, max_tokens=max_tokens, top_k=max(0, asked.top_k)
    )


def _salt(tenant_salt: bytes, cache_salt: str) -> bytes:
    """One salt of the server's and the client's, either of which keeps prefixes apart."""
    if not tenant_salt and not cache_salt:
        return b""
    length = len(tenant_salt).to_bytes(8, "little")
    return hashlib.sha256(length + tenant_salt + cache_salt.encode()).digest()
