"""Completions whose log-probabilities are asked for: `LLM.logprobs`."""

from collections.abc import Iterable, Iterator, Sequence

from jengine.errors import InvalidRequestError
from jengine.input_processor import InputProcessor, Prompt
from jengine.model_info import ModelInfo
from jengine.outputs import RequestOutput

Completion = RequestOutput | tuple[Prompt, Sequence[int]]  # all of an output's; one of a prompt's


def read_completions(
    completions: Iterable[Completion], inputs: InputProcessor, info: ModelInfo
) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, completion) of each as token ids, within the vocabulary and the model's length."""
    for item in completions:
        if isinstance(item, RequestOutput):
            prompt: Prompt = item.prompt_token_ids
            texts = [output.token_ids for output in item.outputs]
        else:
            prompt, text = item
            texts = [[int(token_id) for token_id in text]]
        prompt_ids = inputs.encode_prompt(prompt)
        for text in texts:
            if not all(0 <= token_id < info.vocab_size for token_id in text):
                raise InvalidRequestError(
                    "completions", f"holds ids outside the vocabulary [0, {info.vocab_size})"
                )
            num_tokens = len(prompt_ids) + len(text)
            if num_tokens > info.max_model_len:
                raise InvalidRequestError(
                    "completions",
                    f"prompt and completion have {num_tokens} tokens; "
                    f"the model's length is {info.max_model_len}",
                )
            yield prompt_ids, list(text)


def passes(texts: Sequence[list[int]], max_num_tokens: int) -> Iterator[list[list[int]]]:
    """The texts in order, as many together as have so many tokens; at least one."""
    together: list[list[int]] = []
    num_tokens = 0
    for text in texts:
        if together and num_tokens + len(text) > max_num_tokens:
            yield together
            together, num_tokens = [], 0
        together.append(text)
        num_tokens += len(text)
    if together:
        yield together
