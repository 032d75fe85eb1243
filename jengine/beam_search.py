"""Beam search, as vLLM does it: every step is a request for one token of every beam, whose best 2 x
width log-probabilities it asks for. Beams share their pages through the prefix cache.
"""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from jengine.config import EngineConfig
from jengine.errors import InvalidRequestError
from jengine.input_processor import TokensPrompt
from jengine.model_info import ModelInfo
from jengine.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput
from jengine.request import SamplingParams
from jengine.text.detokenizer import IncrementalDetokenizer
from jengine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jengine.async_engine import AsyncEngine

MAX_LENGTH_PENALTY = 32.0  # lengths to this power are floats, and not 0


class BeamSearchParams(msgspec.Struct, kw_only=True):
    """vLLM's. A beam's score is its log-probability by its length (prompt included, an
    end-of-sequence token not) to the power of `length_penalty`. `temperature` is accepted: scores
    are of the model as it is.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            if (value := getattr(self, name)) < 1:
                raise InvalidRequestError(name, f"must be at least 1, got {value}")
        if self.temperature < 0:
            raise InvalidRequestError("temperature", f"must be >= 0, got {self.temperature}")
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:
            raise InvalidRequestError(
                "length_penalty",
                f"must be in [-{MAX_LENGTH_PENALTY:g}, {MAX_LENGTH_PENALTY:g}], "
                f"got {self.length_penalty}",
            )

    def one_token(self) -> SamplingParams:
        """What a step asks of each beam."""
        return SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=2 * self.beam_width, detokenize=False
        )


@dataclass(slots=True)
class BeamSearchSequence:
    """One beam. `tokens` are the prompt's and its own."""

    tokens: list[int]
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    lora_request: None = None
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None  # "stop" at an end of sequence, "length"
    stop_reason: int | str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best beams, the best first."""

    sequences: list[BeamSearchSequence]


class BeamSearch:
    """The search of one prompt. Whoever drives it completes `beams` by one token each and hands
    over what may follow each, until there are none.
    """

    def __init__(
        self, prompt: Sequence[int], params: BeamSearchParams, eos_token_ids: Sequence[int]
    ) -> None:
        self._params = params
        self._num_prompt = len(prompt)
        self._eos = frozenset(eos_token_ids)
        self._ended: list[BeamSearchSequence] = []
        self.beams = [BeamSearchSequence(list(prompt))]

    def advance(self, positions: Sequence[PositionLogprobs]) -> None:
        """`positions`: of each beam, its candidates for the next token.

        A beam's lists are copied for those that stay in the race only: over a server, texts are
        long and this is the event loop.
        """
        width = self._params.beam_width
        grown: list[tuple[float, BeamSearchSequence, int, PositionLogprobs]] = []
        for beam, candidates in zip(self.beams, positions, strict=True):
            for token, candidate in candidates.items():
                if token in self._eos and not self._params.ignore_eos:
                    successor = _successor(beam, token, candidates)
                    successor.finish_reason = "stop"
                    self._ended.append(successor)
                else:
                    length = len(beam.tokens) + (token not in self._eos)
                    score = self._score_of(beam.cum_logprob + candidate.logprob, length)
                    grown.append((score, beam, token, candidates))
        grown.sort(key=lambda entry: entry[0], reverse=True)
        self._ended = self.best()
        self.beams = [
            _successor(beam, token, candidates) for _, beam, token, candidates in grown[:width]
        ]
        if self.beams and len(self.beams[0].tokens) == self._num_prompt + self._params.max_tokens:
            for beam in self.beams:
                beam.finish_reason = "length"
            self._ended += self.beams
            self.beams = []

    def best(self) -> list[BeamSearchSequence]:
        """The `beam_width` best that have ended, the best first."""
        return sorted(self._ended, key=self._score, reverse=True)[: self._params.beam_width]

    def output(self, tokenizer: Tokenizer | None) -> BeamSearchOutput:
        best = self.best()
        if tokenizer is not None:
            for beam in best:
                beam.text = tokenizer.decode(beam.tokens, skip_special_tokens=False)
        return BeamSearchOutput(best)

    def _score(self, beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.tokens[-1] in self._eos)
        return self._score_of(beam.cum_logprob, length)

    def _score_of(self, cum_logprob: float, length: int) -> float:
        return cum_logprob / length**self._params.length_penalty


async def search_beams(
    engine: "AsyncEngine",
    token_ids: list[int],
    params: BeamSearchParams,
    request_id: str,
    *,
    prompt: str | None = None,
    skip_special_tokens: bool = True,
    **options: Any,
) -> AsyncGenerator[RequestOutput, None]:
    """The search of one prompt, checked by `check_search`. One output, at the end, whose
    completions are the beams: their own tokens and text, less an end of sequence in the text.
    `prompt` is only handed back.

    `options` are those of `AsyncEngine.generate`, and so are the errors: every step's. Closing or
    cancelling it aborts what is under way. A beam that ends with an error ends the search with it.
    """
    search = BeamSearch(token_ids, params, engine.model_info.eos_token_ids)
    one_token = params.one_token()
    first: RequestOutput | None = None
    completions: list[CompletionOutput] = []
    for step in itertools.count():
        if not search.beams:
            break
        outputs = await _together(
            engine.generate(
                TokensPrompt(prompt_token_ids=beam.tokens),
                one_token,
                f"{request_id}-{step}-{i}",
                **options,
            )
            for i, beam in enumerate(search.beams)
        )
        first = first or outputs[0]
        answers = [output.outputs[0] for output in outputs]
        candidates = [answer.logprobs[0] for answer in answers if answer.logprobs]
        if len(candidates) < len(answers):
            reason = next(answer.finish_reason for answer in answers if not answer.logprobs)
            completions = [CompletionOutput(0, "", [], finish_reason=reason)]
            break
        search.advance(candidates)
    for index, beam in enumerate([] if completions else search.best()):
        text = IncrementalDetokenizer(
            engine.tokenizer, token_ids, skip_special_tokens=skip_special_tokens
        )
        own = beam.tokens[len(token_ids) :]
        shown = own[:-1] if beam.finish_reason == "stop" else own
        completions.append(
            CompletionOutput(
                index,
                text.add(shown) + text.finish(),
                own,
                beam.cum_logprob,
                beam.logprobs,
                beam.finish_reason,
                beam.stop_reason,
            )
        )
    assert first is not None  # a search has a step
    now = time.time()
    yield RequestOutput(
        request_id,
        prompt,
        token_ids,
        None,
        completions,
        finished=True,
        metrics=first.metrics
        and dataclasses.replace(first.metrics, last_token_time=now, finished_time=now),
        num_cached_tokens=first.num_cached_tokens,
    )


async def _together(
    requests: Iterable[AsyncGenerator[RequestOutput, None]],
) -> list[RequestOutput]:
    """The last output of each. If one fails, the others are aborted."""

    async def last(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
        async with aclosing(outputs):
            return [output async for output in outputs][-1]

    tasks = [asyncio.ensure_future(last(outputs)) for outputs in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_search(
    params: BeamSearchParams,
    prompts: Sequence[Sequence[int]],
    info: ModelInfo,
    config: EngineConfig,
) -> None:
    """Raise `InvalidRequestError` unless every step can be asked for."""
    limit = info.vocab_size if config.max_logprobs == -1 else config.max_logprobs
    if 2 * params.beam_width > limit:
        raise InvalidRequestError(
            "beam_width",
            f"must be at most {limit // 2}, half of the engine's max_logprobs, "
            f"got {params.beam_width}",
        )
    if config.logprobs_mode != "raw_logprobs":
        raise InvalidRequestError(
            "beam_width", f"needs raw log-probabilities: logprobs_mode is {config.logprobs_mode}"
        )
    room = info.max_model_len - max(map(len, prompts), default=0)
    if params.max_tokens > room:
        raise InvalidRequestError(
            "max_tokens",
            f"must be at most {room}, what the model's length leaves the longest prompt, "
            f"got {params.max_tokens}",
        )


def _successor(
    beam: BeamSearchSequence, token: int, candidates: Mapping[int, Logprob]
) -> BeamSearchSequence:
    return BeamSearchSequence(
        [*beam.tokens, token],
        [*beam.logprobs, dict(candidates)],
        cum_logprob=beam.cum_logprob + candidates[token].logprob,
    )
