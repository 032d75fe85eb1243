"""What the client hands out, and what it takes besides sampling parameters. Plain data."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from jengine.errors import JengineError


class RpcFailedError(JengineError):
    """A status that no other error stands for; `code` is its name, such as "UNAUTHENTICATED"."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float
    rank: int
    token: str


Position = tuple[TokenLogprob, ...]  # the chosen token first


@dataclass(frozen=True, slots=True)
class Finish:
    """How a completion ended. `stop` is the text or token id that matched. Spans are seconds."""

    reason: str
    stop: str | int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_seconds: float | None
    time_to_first_token: float | None
    decode_seconds: float | None
    total_seconds: float | None
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model saw; ids and logprobs only if asked for."""

    num_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[Position, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of completion `index`. `prompt` is in the first of a stream, `finish` in the last
    of a completion.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Position, ...] = ()
    prompt: Prompt | None = None
    finish: Finish | None = None


@dataclass(slots=True)
class Completion:
    """All deltas of one completion."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Position] = field(default_factory=list)
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Facts about a server. `load` has num_running, num_waiting, num_pages_used, is_draining."""

    version: str
    served_names: tuple[str, ...]
    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    default_sampling_params: dict[str, Any]
    limits: dict[str, int]
    load: dict[str, int]
    memory_plan: str
    uptime_seconds: float


@dataclass(frozen=True, slots=True)
class CallOptions:
    """All of a request that is not sampling. `timeout` is the call's deadline in seconds."""

    request_id: str = ""
    model: str = ""
    priority: int = 0
    cache_salt: str = ""
    final_only: bool = False
    prompt_token_ids: bool = False
    timeout: float | None = None


def collect(deltas: Iterable[Delta]) -> list[Completion]:
    """Join a stream: one `Completion` for each index, in order."""
    completions: dict[int, Completion] = {}
    for delta in deltas:
        completion = completions.setdefault(delta.index, Completion(delta.index))
        completion.text += delta.text
        completion.token_ids += delta.token_ids
        completion.logprobs += delta.logprobs
        completion.finish = delta.finish or completion.finish
    return [completions[index] for index in sorted(completions)]
