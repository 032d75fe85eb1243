"""`use_beam_search` of the OpenAI API (vLLM's extension): `n` beams instead of `n` draws."""

from __future__ import annotations

from collections.abc import Sequence

from jengine.beam_search import BeamSearchParams, check_search
from jengine.errors import InvalidRequestError
from jengine.server.openai_constraints import read_constraint
from jengine.server.openai_protocol import ChatRequest, CompletionRequest
from jengine.server.state import ServerState


def check_beams(body: CompletionRequest | ChatRequest) -> None:
    """Refuse what a search does not honour. How tokens are drawn (temperature, top_p, top_k, min_p,
    seed) means nothing to it, and clients always send some of that.
    """
    top = body.top
    constraint = read_constraint(body.response_format, body.structured_outputs)
    refused: dict[str, object] = {
        "stream": body.stream,
        "stop": body.stop,
        "stop_token_ids": body.stop_token_ids,
        "min_tokens": body.min_tokens,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty not in (None, 1.0),
        "logit_bias": body.logit_bias,
        "allowed_token_ids": body.allowed_token_ids is not None,
        "bad_words": body.bad_words,
        "structured_outputs": body.structured_outputs,
        "response_format": constraint is not None,
        "repetition_detection": body.repetition_detection,
        "thinking_token_budget": body.thinking_token_budget not in (None, -1),
        "vllm_xargs": body.vllm_xargs,
        "prompt_logprobs": body.prompt_logprobs is not None,
        "logprob_token_ids": body.logprob_token_ids,
        "truncate_prompt_tokens": body.truncate_prompt_tokens is not None,
        "echo": body.echo and top is not None,  # nobody scores the prompt
    }
    for name, value in refused.items():
        if value:
            raise InvalidRequestError(name, "is not available with use_beam_search")
    most = 2 * (body.n or 1)
    if isinstance(top, int) and not 0 <= top <= most:
        raise InvalidRequestError(
            "logprobs" if isinstance(body, CompletionRequest) else "top_logprobs",
            f"must be in [0, {most}] (twice n) with use_beam_search, got {top}",
        )


def build_beams(
    state: ServerState,
    body: CompletionRequest | ChatRequest,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
) -> BeamSearchParams | None:
    """`max_tokens` None: what the longest prompt leaves of the model's length."""
    if not body.use_beam_search:
        return None
    check_beams(body)
    info = state.ready_engine().model_info
    if max_tokens is None:
        max_tokens = info.max_model_len - max(map(len, prompts))
    try:
        params = BeamSearchParams(
            beam_width=1 if body.n is None else body.n,
            max_tokens=max_tokens,
            ignore_eos=body.ignore_eos,
            length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
            include_stop_str_in_output=body.include_stop_str_in_output,
        )
        check_search(params, prompts, info, state.config)
    except InvalidRequestError as error:
        raise InvalidRequestError(
            "n" if error.field == "beam_width" else error.field, error.message
        ) from None
    return params
