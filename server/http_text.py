"""/tokenize, /detokenize and /tokenizer_info: enough for clients that count or score tokens (lm-
eval).
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from jengine.errors import InvalidRequestError
from jengine.server import openai_chat
from jengine.server.http_errors import json_response
from jengine.server.http_io import read_body
from jengine.server.openai_protocol import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from jengine.server.state import ServerState

if TYPE_CHECKING:
    from jengine.text.tokenizer import Tokenizer


async def tokenize(request: Request) -> Response:
    state: ServerState = request.app.state.server
    fields = await read_body(request, dict[str, msgspec.Raw])
    engine = state.ready_engine()
    if "messages" in fields:
        chat = await read_body(request, TokenizeChatRequest)
        state.check_model(chat.model)
        chat.check_conversation(trust_template=state.settings.trust_request_chat_template)
        ids = (await openai_chat.render(state, chat)).token_ids
        wants_strings = chat.return_token_strs
    else:
        text = await read_body(request, TokenizeTextRequest)
        state.check_model(text.model)
        ids = await engine.encode(text.prompt, add_special_tokens=text.add_special_tokens)
        wants_strings = text.return_token_strs
    strings = [engine.tokenizer.id_to_token(i) for i in ids] if wants_strings else None
    return json_response(
        {
            "count": len(ids),
            "max_model_len": engine.model_info.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
    )


async def detokenize(request: Request) -> Response:
    state: ServerState = request.app.state.server
    body = await read_body(request, DetokenizeRequest)
    state.check_model(body.model)
    engine = state.ready_engine()
    vocab_size = engine.model_info.vocab_size
    for token_id in body.tokens:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                "tokens", f"token id {token_id} is outside the vocabulary [0, {vocab_size})"
            )
    return json_response({"prompt": await engine.decode(body.tokens)})


async def tokenizer_info(request: Request) -> Response:
    """The tokenizer's configuration, as its makers wrote it, and the chat template."""
    state: ServerState = request.app.state.server
    engine = state.ready_engine()
    folder = engine.model_info.tokenizer_folder
    info = await asyncio.to_thread(read_tokenizer_config, engine.tokenizer, folder)
    info.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if engine.tokenizer.chat_template is not None:
        info["chat_template"] = engine.tokenizer.chat_template
    return json_response(info)


def read_tokenizer_config(tokenizer: Tokenizer, folder: Path | None) -> dict[str, Any]:
    """From the model's folder; a tokenizer from a GGUF file writes its own first. Blocks."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="jengine-tokenizer-") as scratch:
            tokenizer.save(Path(scratch))
            return read_tokenizer_config(tokenizer, Path(scratch))
    path = folder / "tokenizer_config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
