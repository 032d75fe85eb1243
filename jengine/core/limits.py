"""Bounds of one request: what can never fit, where its output ends, and how far the device may go
without asking the host.
"""

from jengine.config import SchedulerConfig
from jengine.errors import InvalidRequestError, QueueFullError
from jengine.request import FinishReason, Request


def check_fits(request: Request, max_model_len: int, max_kv_tokens: int) -> None:
    """Raise `InvalidRequestError` if the request could not run to its end even alone."""
    num_prompt_tokens = request.num_prompt_tokens
    if num_prompt_tokens == 0:
        raise InvalidRequestError("prompt", "must hold at least one token")
    if num_prompt_tokens >= max_model_len:
        raise InvalidRequestError(
            "prompt",
            f"holds {num_prompt_tokens} tokens; the model takes {max_model_len}, "
            "of which at least one must be left for the output",
        )
    if num_prompt_tokens > max_kv_tokens:
        raise InvalidRequestError(
            "prompt", f"holds {num_prompt_tokens} tokens; the KV cache holds {max_kv_tokens}"
        )
    # The last token sampled is never computed. Without this check the request would preempt
    # itself for ever, once alone with a pool that is too small for it.
    if request.max_num_tokens - 1 > max_kv_tokens:
        raise InvalidRequestError(
            "max_tokens",
            f"{num_prompt_tokens} prompt tokens leave room for "
            f"{max_kv_tokens - num_prompt_tokens + 1} in the KV cache, which holds {max_kv_tokens}",
        )


def check_queue(
    request: Request, config: SchedulerConfig, num_waiting: int, num_waiting_tokens: int
) -> None:
    """Raise `QueueFullError` if the request may not wait with those that do.

    The bound of tokens is none for the first: refused once, a long prompt would be refused for
    ever.
    """
    if num_waiting >= config.max_num_waiting:
        raise QueueFullError(f"{num_waiting} requests are waiting, which is the limit")
    limit = config.max_num_waiting_tokens
    num_tokens = num_waiting_tokens + request.num_prompt_tokens
    if limit is not None and num_waiting and num_tokens > limit:
        raise QueueFullError(
            f"{num_waiting_tokens} prompt tokens are waiting; with {request.num_prompt_tokens} "
            f"more they pass the limit of {limit}"
        )


def max_num_tokens(request: Request, max_model_len: int) -> int:
    """Prompt and output tokens at which the request ends."""
    max_tokens = request.sampling.max_tokens
    if max_tokens is None:
        return max_model_len
    return min(request.num_prompt_tokens + max_tokens, max_model_len)


def finish_reason(request: Request, token_id: int) -> FinishReason | None:
    """Why the request ends with its newest token, if it does; sets `stop_reason`."""
    if token_id in request.stop_ids and request.num_output_tokens >= request.sampling.min_tokens:
        if token_id not in request.eos_token_ids or request.sampling.ignore_eos:
            request.stop_reason = token_id
        return FinishReason.STOP
    if len(request.token_ids) >= request.max_num_tokens:
        return FinishReason.LENGTH
    detection = request.sampling.repetition_detection
    if detection is not None and detection.is_met(request.token_ids, request.num_output_tokens):
        request.stop_reason = "repetition_detected"
        return FinishReason.REPETITION
    return None


def num_decodes_ahead(request: Request) -> int:
    """Most tokens that may be sampled for a decoding request before the host sees the first of
    them. Stops are no limit: what is sampled past them is dropped."""
    sampling = request.sampling
    if request.needs_host_tokens or sampling.wants_logprobs:
        return 1
    num_tokens = len(request.token_ids) + request.num_pending_tokens
    num_ahead = request.max_num_tokens - num_tokens
    num_held_back = sampling.min_tokens - (num_tokens - len(request.prompt_token_ids))
    # While `min_tokens` is not reached, ids that stop are banned: the same ones for a whole plan.
    return min(num_ahead, num_held_back) if num_held_back > 0 else num_ahead
