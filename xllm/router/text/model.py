"""A model's text side: its tokenizer, special tokens and chat template, from its directory.

Loads `tokenizer.json` with the `tokenizers` library; neither torch nor transformers is imported.
Which special tokens an encoding begins with is tokenizer.json's word (as in transformers 5, which
ignores tokenizer_config's add_bos_token beside it). Knows no requests. Encoding is the dear part
(100 us for 512 characters, 77 ms for 220 KB): who calls it with long texts does so in a thread
(the library releases the interpreter's lock).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from xllm.errors import DependencyError, InvalidRequestError
from xllm.protocol.generation import ChatMessage
from xllm.protocol.sampling import SamplingParams
from xllm.protocol.token_bytes import pack_tokens, unpack_tokens
from xllm.router.text.detokenizer import Detokenizer, PieceDetokenizer, WindowDetokenizer
from xllm.router.text.model_files import read_object
from xllm.router.text.output import TextOutput
from xllm.router.text.pieces import ByteLevelScheme, PieceScheme, PieceTable, find_scheme
from xllm.router.text.segments import MAX_BYTES, SegmentEncoder, make_segment_encoder
from xllm.router.text.stops import StopMatcher
from xllm.router.text.template import ChatTemplate, find_template

_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class TextModel:
    """What turns text into this model's tokens and back."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        scheme: PieceScheme | None,
        template: ChatTemplate | None,
        kept_bytes: int = MAX_BYTES,
    ) -> None:
        """`kept_bytes`: of encoded texts that are remembered for the next turn, at most."""
        self._tokenizer = tokenizer
        self._scheme = scheme
        self._template = template
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        table_scheme = scheme or PieceScheme()
        self._all_pieces = PieceTable(tokenizer, table_scheme, frozenset())
        self._shown_pieces = PieceTable(tokenizer, table_scheme, self._special_ids)
        self.segments: SegmentEncoder | None = None
        """What remembers encoded texts, where the tokenizer lets it."""
        if isinstance(scheme, ByteLevelScheme):
            self.segments = make_segment_encoder(tokenizer, kept_bytes)
        self._adds_tokens = tokenizer.num_special_tokens_to_add(is_pair=False) > 0
        self.longest_token_bytes = _longest(tokenizer, scheme)
        """No token stands for more bytes: more than context x this cannot fit the context."""

    @property
    def has_template(self) -> bool:
        """Whether the model can chat."""
        return self._template is not None

    @property
    def num_tokens(self) -> int:
        """Tokens that the tokenizer knows, added ones included."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str, add_special_tokens: bool = True, owner: bytes = b"") -> list[int]:
        """Token ids of a text. `owner`: whose earlier texts may shorten the work."""
        return unpack_tokens(self.pack(text, add_special_tokens, owner)).tolist()

    def pack(self, text: str, add_special_tokens: bool = True, owner: bytes = b"") -> bytes:
        """The same as bytes (see token_bytes)."""
        if self.segments is not None and not (add_special_tokens and self._adds_tokens):
            return self.segments.pack(text, owner)
        fast = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return pack_tokens(fast[0].ids)

    def render(self, messages: Sequence[ChatMessage], kwargs: Mapping[str, Any]) -> str:
        """A conversation as text, special tokens included: encode it without adding any."""
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template: use completions", param="messages"
            )
        return self._template.render(messages, kwargs)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, from the beginning of a text."""
        output = TextOutput(self._detokenizer(skip_special_tokens, continues=False))
        return output.feed(token_ids) + output.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token amid a text; empty for unknown ids."""
        if self._scheme is not None:
            return self._all_pieces[token_id]
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text.encode()

    def output(self, sampling: SamplingParams, prompt_ids: Sequence[int]) -> TextOutput:
        """A fresh output object of one choice of a request with this prompt.

        Output continues its prompt: a leading space is stripped only after an empty one."""
        continues = False
        if self._scheme is None or self._scheme.strip_start:
            special = self._special_ids if sampling.skip_special_tokens else ()
            continues = any(token_id not in special for token_id in prompt_ids)
        detokenizer = self._detokenizer(sampling.skip_special_tokens, continues)
        if not sampling.stop:
            return TextOutput(detokenizer)
        matcher = StopMatcher(sampling.stop, sampling.include_stop_str_in_output)
        return TextOutput(detokenizer, matcher, sampling.min_tokens)

    def _detokenizer(self, skip_special_tokens: bool, continues: bool) -> Detokenizer:
        if self._scheme is None:
            return WindowDetokenizer(self._tokenizer, skip_special_tokens)
        pieces = self._shown_pieces if skip_special_tokens else self._all_pieces
        return PieceDetokenizer(pieces, 0 if continues else self._scheme.strip_start)


def load_text_model(path: str, kept_bytes: int = MAX_BYTES) -> TextModel:
    """The text side of the model in a directory; DependencyError where it has none. `kept_bytes`
    as in TextModel."""
    directory = Path(path)
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise DependencyError(f"{directory.name} has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
        decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None
    except Exception as error:  # the library raises bare Exception for whatever it dislikes
        raise DependencyError(f"tokenizer.json of {directory.name}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _read_config(directory / "tokenizer_config.json")
    special_tokens = _special_tokens(directory, config)
    source = find_template(directory, config)
    template = ChatTemplate(source, special_tokens) if source is not None else None
    return TextModel(tokenizer, find_scheme(decoder), template, kept_bytes)


def _read_config(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its kin by name, as the template sees them."""
    named = _read_config(directory / "special_tokens_map.json")
    named.update({name: config[name] for name in _SPECIAL_NAMES if name in config})
    found = {}
    for name in _SPECIAL_NAMES:
        token = named.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _longest(tokenizer: Tokenizer, scheme: PieceScheme | None) -> int:
    names = tokenizer.get_vocab(with_added_tokens=True)
    if isinstance(scheme, ByteLevelScheme):
        # one character a byte, save for added tokens, which are their own text
        added = tokenizer.get_added_tokens_decoder().values()
        longest = max((len(token.content.encode()) for token in added), default=1)
        return max(longest, max(map(len, names), default=1))
    return max((len(name.encode()) for name in names), default=1)
