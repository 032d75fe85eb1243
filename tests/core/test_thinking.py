"""Thinking budgets on random tokens, against what the whole text says."""

import random

import numpy as np
import pytest

from jengine.core.thinking import ThinkingBudget
from jengine.request import Request, SamplingParams

VOCAB_SIZE = 40
START, END = [1], [2, 2, 3]  # a marker that may begin anew inside of itself


def allowed(constraint: ThinkingBudget) -> list[int]:
    mask = constraint.mask
    if mask is None:
        return list(range(VOCAB_SIZE))
    assert mask.shape == (2,) and mask.dtype == np.int32
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def open_block(tokens: list[int]) -> list[int] | None:
    """The oracle: reads the text from its beginning, as characters."""
    text = "".join(map(chr, tokens))
    start, end = ("".join(map(chr, marker)) for marker in (START, END))
    head, opened, block = text.rpartition(start)
    _, closed, after = text.rpartition(end)
    if not opened or (closed and len(text) - len(after) > len(head) + len(start)):
        return None
    return list(map(ord, block))


@pytest.mark.parametrize("seed", range(40))
def test_a_block_has_its_tokens_and_an_end(seed: int) -> None:
    rng = random.Random(seed)
    budget, num_prompt = rng.randrange(6), rng.randrange(1, 9)
    # Few different tokens: markers, and pieces of them, come by chance.
    prompt = [rng.choice((1, 2, 2, 3, 5)) for _ in range(num_prompt)]
    params = SamplingParams(thinking_token_budget=budget, thinking_markers=[START, END])
    request = Request("r", prompt, params)
    constraint = ThinkingBudget(request, VOCAB_SIZE)
    most = max(budget, len(open_block(prompt) or ())) + len(END)
    for _ in range(40):
        block = open_block(request.token_ids)
        choices = allowed(constraint)
        if block is None or len(block) < budget:
            assert choices == list(range(VOCAB_SIZE))
            # A start marker inside of a block would be another beginning to the oracle.
            choices = [2, 2, 3, 5] if block is not None else [1, 2, 3, 5]
        else:
            (token,) = choices
            said = max(k for k in range(3) if block[len(block) - k :] == END[:k])
            assert token == END[said]
            assert len(block) < most
        request.token_ids.append(rng.choice(choices))
        constraint.advance(request.token_ids[-1], ())


def test_what_is_banned_is_not_forced() -> None:
    params = SamplingParams(
        thinking_token_budget=1, thinking_markers=[[1], [2]], stop_token_ids=[2], min_tokens=2,
        max_tokens=9,
    )  # fmt: skip
    request = Request("r", [1, 5], params)
    constraint = ThinkingBudget(request, VOCAB_SIZE)
    assert constraint.mask is None
    request.token_ids.append(6)
    constraint.advance(6, request.banned_ids(1))
    assert constraint.mask is None
    request.token_ids.append(6)
    constraint.advance(6, request.banned_ids(2))
    assert allowed(constraint) == [2]
    assert constraint.is_ready and constraint.finish_reason is None
