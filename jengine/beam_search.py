"""Beam search, as vLLM does it: every step is a request for one token of every beam, whose best 2 x
width log-probabilities it asks for. Beams share their pages through the prefix cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from jengine.config import EngineConfig
from jengine.errors import InvalidRequestError
from jengine.model_info import ModelInfo
from jengine.outputs import Logprob, PositionLogprobs
from jengine.request import SamplingParams
from jengine.text.tokenizer import Tokenizer


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
        """`positions`: of each beam, its candidates for the next token."""
        grown: list[BeamSearchSequence] = []
        for beam, candidates in zip(self.beams, positions, strict=True):
            for token, candidate in candidates.items():
                successor = _successor(beam, token, candidate, candidates)
                if token in self._eos and not self._params.ignore_eos:
                    successor.finish_reason = "stop"
                    self._ended.append(successor)
                else:
                    grown.append(successor)
        grown.sort(key=self._score, reverse=True)
        self.beams = grown[: self._params.beam_width]
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
        return beam.cum_logprob / length**self._params.length_penalty


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
    beam: BeamSearchSequence,
    token: int,
    candidate: Logprob,
    candidates: Mapping[int, Logprob],
) -> BeamSearchSequence:
    return BeamSearchSequence(
        [*beam.tokens, token],
        [*beam.logprobs, dict(candidates)],
        cum_logprob=beam.cum_logprob + candidate.logprob,
    )
