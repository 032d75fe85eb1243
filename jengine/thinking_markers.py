"""The front end's half of `thinking_token_budget`: which tokens open and close a block."""

from jengine.config import ReasoningConfig
from jengine.errors import InvalidRequestError
from jengine.request import SamplingParams
from jengine.text.tokenizer import Tokenizer

FIELD = "thinking_token_budget"


def find_markers(
    sampling: SamplingParams, config: ReasoningConfig | None, tokenizer: Tokenizer | None
) -> list[list[int]] | None:
    """Token ids of the start and of the end marker; None for a request without a budget. Raises
    `InvalidRequestError` where the end could not be forced.
    """
    if sampling.thinking_token_budget is None:
        return None
    if config is None:
        raise InvalidRequestError(FIELD, "needs an engine started with reasoning_config")
    if tokenizer is None:
        raise InvalidRequestError(
            FIELD, "needs a tokenizer: the engine was started with skip_tokenizer_init"
        )
    if sampling.structured_outputs is not None:
        raise InvalidRequestError(FIELD, "cannot be combined with structured_outputs")
    texts = (config.reasoning_start_str, config.reasoning_end_str)
    markers = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if not all(markers):
        raise InvalidRequestError(FIELD, "reasoning_config of the engine holds an empty marker")
    if sampling.allowed_token_ids is not None and not set(markers[1]) <= set(
        sampling.allowed_token_ids
    ):
        raise InvalidRequestError(
            FIELD, f"allowed_token_ids must hold those of the end marker, {markers[1]}"
        )
    return markers
