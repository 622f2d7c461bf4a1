"""Token ids of texts and texts of token ids, as work of its own: long ones in a thread."""

from __future__ import annotations

from functools import partial

from xllm.protocol.questions import DetokenizedText, DetokenizeIds, TokenizedText, TokenizeText
from xllm.router.effort import LONG_IDS, is_long_talk, is_long_text
from xllm.router.front import Tenant
from xllm.router.models import ServedModels
from xllm.router.text.pool import TextPool


class TextWork:
    """Of all models served. Counts against no limit: that is for who asks."""

    def __init__(self, served: ServedModels, pool: TextPool) -> None:
        self._served = served
        self._pool = pool

    async def encode(self, request: TokenizeText, tenant: Tenant) -> TokenizedText:
        """Token ids of a text or of messages; XllmError where it cannot."""
        intake = self._served.find(request.model)
        info = intake.check_text(request)
        talk = request.messages
        if is_long_text(request.text or "") or (talk is not None and is_long_talk(talk)):
            ids = await self._pool.run(tenant.name, partial(intake.encode_text, request, tenant))
        else:
            ids = intake.encode_text(request, tenant)
        return TokenizedText(id=request.id, token_ids=ids, max_model_len=info.max_model_len)

    async def decode(self, request: DetokenizeIds, tenant: Tenant) -> DetokenizedText:
        """The text of token ids; XllmError where it cannot."""
        intake = self._served.find(request.model)
        ids = request.token_ids
        intake.check_ids(ids)
        decode = partial(intake.text.decode, ids, skip_special_tokens=False)
        text = await self._pool.run(tenant.name, decode) if len(ids) > LONG_IDS else decode()
        return DetokenizedText(id=request.id, text=text)
