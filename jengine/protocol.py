"""Messages between front end and engine core: msgspec structs, msgpack on the wire, one version
number.

The same structs are passed by reference when the core runs in a thread.
"""

from enum import StrEnum

import msgspec

from jengine.logits_processors import ProcessorInfo
from jengine.request import FinishReason, SamplingParams

PROTOCOL_VERSION = 3
NIL = msgspec.Raw(b"\xc0")  # msgpack's None


class CoreRequest(msgspec.Struct, tag="add", array_like=True):
    """A tokenised, validated request for one completion (n > 1 is split by the front end)."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: list[int]
    seed: int
    priority: int
    cache_salt: str
    arrival_time: float
    is_streamed: bool = True  # False: its tokens are wanted at its end, all in one `CoreOutput`
    grammar: str = ""  # of structured outputs, as llguidance reads it; it has been tried out


class CoreRequests(msgspec.Struct, tag="add_all", array_like=True):
    """Requests that came together. In one message, or the first step would hold what had arrived by
    then, and the others would wait for it.
    """

    requests: list[CoreRequest]


class AbortRequests(msgspec.Struct, tag="abort", array_like=True):
    """`reason` is "stop" when the front end found a stop string, else "abort"."""

    request_ids: list[str]
    reason: FinishReason = FinishReason.ABORT


class CallUtility(msgspec.Struct, tag="call", array_like=True):
    """A rare operation of the core (`reset_prefix_cache`, `memory_plan`, ...), answered by
    `UtilityResult`.
    """

    call_id: int
    method: str
    args: list[msgspec.Raw] = []


class Shutdown(msgspec.Struct, tag="shutdown", array_like=True):
    """Stop. With `drain_seconds` > 0 running requests may finish first."""

    drain_seconds: float = 0.0


ToCore = CoreRequest | CoreRequests | AbortRequests | CallUtility | Shutdown


class LogprobsData(msgspec.Struct, array_like=True):
    token_ids: list[int]
    logprobs: list[float]
    rank: int
    ranks: list[int] | None = None  # of the others, if they are not the best ones in order


class Refusal(StrEnum):
    """Why the core did not take a request."""

    QUEUE_FULL = "queue_full"
    INVALID = "invalid"


class CoreOutput(msgspec.Struct, array_like=True, gc=False):
    """What is new of one request: the tokens of a step, of several, or of all (`is_streamed`).

    What is below `prompt_logprobs` comes with the first tokens and with the last; in between it may
    be left at its defaults.
    """

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[LogprobsData] | None = None
    prompt_logprobs: list[LogprobsData] | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    error: str | None = None  # with finish_reason "error"
    refusal: Refusal | None = None  # set when the request was never admitted
    ends_in_text: bool = False  # with finish_reason "stop": its last token is not what stopped it


class EngineStats(msgspec.Struct, array_like=True):
    """A snapshot after a step. Counters are totals since start."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0  # prompt tokens of queued requests not yet computed
    num_pages_used: int = 0
    num_pages_total: int = 0
    page_size: int = 16
    num_preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_steps: int = 0  # forward passes, of which one dispatch may hold several
    num_compilations: int = 0  # that nobody prepared; any is a bug
    scheduled_tokens: int = 0  # tokens of the last step
    padded_tokens: int = 0  # its bucket
    num_compiling: int = 0  # executables that are not ready yet, while larger ones serve
    num_grammars: int = 0  # compiled for structured outputs
    num_masks: int = 0  # computed, one for each token of a constrained request
    mask_seconds: float = 0.0  # spent on them, in threads of their own
    num_corrupted: int = 0  # requests that ended because their logits were not finite


class StepOutputs(msgspec.Struct, tag="outputs", array_like=True):
    outputs: list[CoreOutput]
    stats: EngineStats
    timestamp: float


class UtilityResult(msgspec.Struct, tag="result", array_like=True):
    call_id: int
    value: msgspec.Raw = NIL  # not optional by type: msgspec cannot decode a union with Raw
    error: str | None = None


class CoreReady(msgspec.Struct, tag="ready", array_like=True):
    """Sent once the first bucket can serve."""

    protocol_version: int
    num_pages: int
    page_size: int
    max_model_len: int
    vocab_size: int
    memory_plan: str
    startup_seconds: float
    compile_seconds: float = 0.0  # of those: making executables ready, compiled or loaded
    dtype: str = ""  # of activations and parameters, "auto" resolved
    phases: dict[str, float] = {}  # startup_seconds by part
    num_compiled: int = 0  # executables that were not found on disk
    num_compiling: int = 0  # of all, those that are still being compiled
    logits_processors: list[ProcessorInfo] = []  # what `extra_args` may hold


class CoreDead(msgspec.Struct, tag="dead", array_like=True):
    error: str


FromCore = StepOutputs | UtilityResult | CoreReady | CoreDead
