"""An engine core without a model, for tests of the front end: it answers with what it was asked.

Token i of a completion is prompt token `i % len(prompt)`; with a temperature it is drawn from
(seed, i) instead. Importable by name, because a spawned process imports it. `hf_overrides["echo"]`
steers it, see `Behaviour`.
"""

import logging
import os
import queue
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import tokenizers

from jengine.config import EngineConfig
from jengine.protocol import (
    PROTOCOL_VERSION,
    AbortRequests,
    CallUtility,
    CoreDead,
    CoreOutput,
    CoreReady,
    CoreRequest,
    CoreRequests,
    EngineStats,
    FromCore,
    LogprobsData,
    Refusal,
    Shutdown,
    StepOutputs,
    ToCore,
    UtilityResult,
)
from jengine.request import FinishReason

logger = logging.getLogger("jengine.echo")

FACTORY = "tests.oracles.echo_core:EchoCore"
EOS_ID = 256
VOCAB_SIZE = 258  # 256 bytes, <eos>, <bos>


@dataclass(frozen=True)
class Behaviour:
    step_seconds: float = 0.0
    tokens_per_step: int = 1
    die_at_step: int = -1  # send CoreDead
    exit_at_step: int = -1  # vanish without a word, exit code 7
    fail_to_load: str = ""
    log: str = ""
    protocol_version: int = PROTOCOL_VERSION


@dataclass
class Running:
    request: CoreRequest
    token_ids: list[int] = field(default_factory=list)
    num_prompt_seen: int = 0


def make_echo_model(folder: Path) -> Path:
    """A model folder whose tokenizer has one token for each byte, so that characters and stop
    strings get split.
    """
    alphabet = _byte_alphabet()
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<bos>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    _write_json(
        folder / "tokenizer_config.json",
        {"eos_token": "<eos>", "bos_token": "<bos>", "chat_template": template},
    )
    _write_json(
        folder / "config.json",
        {"architectures": ["EchoForCausalLM"], "model_type": "echo", "eos_token_id": EOS_ID},
    )
    _write_json(
        folder / "generation_config.json",
        {"eos_token_id": [EOS_ID], "temperature": 0.0, "max_new_tokens": 7},
    )
    return folder


class EchoCore:
    def __init__(self, config: EngineConfig, emit: Callable[[FromCore], None]) -> None:
        self._config = config
        self._emit = emit
        self._do = Behaviour(**config.model.hf_overrides.get("echo", {}))
        self._inbox: queue.SimpleQueue[ToCore] = queue.SimpleQueue()
        self._running: dict[str, Running] = {}
        self._num_steps = 0
        self._is_stopped = False
        self.max_model_len = config.model.max_model_len or 1024
        self.aborted: list[tuple[str, FinishReason]] = []

    def submit(self, message: ToCore) -> None:
        self._inbox.put(message)

    def run(self) -> None:
        if self._do.fail_to_load:
            self._emit(CoreDead(self._do.fail_to_load))
            return
        if self._do.log:
            logger.info(self._do.log)
        self._emit(
            CoreReady(
                protocol_version=self._do.protocol_version,
                num_pages=8,
                page_size=16,
                max_model_len=self.max_model_len,
                vocab_size=VOCAB_SIZE,
                memory_plan="echo",
                startup_seconds=0.0,
                dtype="float32",
            )
        )
        while not self._is_stopped:
            self._read_inbox()
            if self._running and not self._step():
                return

    def _read_inbox(self) -> None:
        while not self._is_stopped:
            try:
                self._handle(self._inbox.get(block=not self._running))
            except queue.Empty:
                return

    def _handle(self, message: ToCore) -> None:
        match message:
            case CoreRequest():
                if len(self._running) >= self._config.scheduler.max_num_waiting:
                    output = CoreOutput(message.request_id, [], FinishReason.ERROR)
                    output.error, output.refusal = "the waiting queue is full", Refusal.QUEUE_FULL
                    self._tell([output])
                else:
                    self._running[message.request_id] = Running(message)
            case CoreRequests(requests):
                for request in requests:
                    self._handle(request)
            case AbortRequests(request_ids=request_ids, reason=reason):
                self.aborted += [(i, reason) for i in request_ids]
                for request_id in request_ids:
                    self._running.pop(request_id, None)
            case CallUtility(call_id=call_id, method=method, args=args):
                self._call(call_id, method, [msgspec.msgpack.decode(arg) for arg in args])
            case Shutdown():
                self._is_stopped = True

    def _call(self, call_id: int, method: str, args: list[object]) -> None:
        values = {
            "reset_prefix_cache": lambda: not self._running,
            "echo": lambda: args,
            "aborted": lambda: [[i, reason.value] for i, reason in self.aborted],
            "running": lambda: sorted(self._running),
        }
        if method not in values:
            self._emit(UtilityResult(call_id, error="unknown"))
            return
        self._emit(UtilityResult(call_id, msgspec.Raw(msgspec.msgpack.encode(values[method]()))))

    def _step(self) -> bool:
        """False if this step was the last."""
        self._num_steps += 1
        if self._num_steps == self._do.exit_at_step:
            os._exit(7)
        if self._num_steps == self._do.die_at_step:
            self._emit(CoreDead("died as it was told to"))
            return False
        if self._do.step_seconds:
            time.sleep(self._do.step_seconds)
        self._tell([self._advance(running) for running in list(self._running.values())])
        return True

    def _advance(self, running: Running) -> CoreOutput:
        request = running.request
        sampling = request.sampling
        output = CoreOutput(request.request_id, [], num_cached_tokens=3, scheduled_time=time.time())
        if sampling.prompt_logprobs is not None and not running.token_ids:
            rest = request.prompt_token_ids[1:]
            output.prompt_logprobs = [_logprobs(i, sampling.prompt_logprobs) for i in rest]
        for _ in range(self._do.tokens_per_step):
            token_id = self._next_token(running)
            running.token_ids.append(token_id)
            output.new_token_ids.append(token_id)
            self._check_end(running, token_id, output)
            if output.finish_reason is not None:
                del self._running[request.request_id]
                break
        if sampling.wants_logprobs:
            named = sampling.logprob_token_ids
            output.logprobs = [
                _named(i, named) if named else _logprobs(i, sampling.logprobs or 0)
                for i in output.new_token_ids
            ]
        return output

    def _next_token(self, running: Running) -> int:
        request, position = running.request, len(running.token_ids)
        if request.sampling.temperature > 0:
            return random.Random(request.seed * 1000 + position).randrange(97, 123)
        return request.prompt_token_ids[position % len(request.prompt_token_ids)]

    def _check_end(self, running: Running, token_id: int, output: CoreOutput) -> None:
        sampling = running.request.sampling
        if len(running.token_ids) > sampling.min_tokens:
            if token_id in running.request.eos_token_ids and not sampling.ignore_eos:
                output.finish_reason = FinishReason.STOP
            elif token_id in (sampling.stop_token_ids or ()):
                output.finish_reason, output.stop_reason = FinishReason.STOP, token_id
        detection, num_outputs = sampling.repetition_detection, len(running.token_ids)
        if detection is not None and detection.is_met(running.token_ids, num_outputs):
            output.finish_reason, output.stop_reason = (
                FinishReason.REPETITION,
                "repetition_detected",
            )
        num_tokens = len(running.request.prompt_token_ids) + len(running.token_ids)
        is_full = len(running.token_ids) >= (sampling.max_tokens or 0)
        if output.finish_reason is None and (is_full or num_tokens >= self.max_model_len):
            output.finish_reason = FinishReason.LENGTH

    def _tell(self, outputs: list[CoreOutput]) -> None:
        stats = EngineStats(num_running=len(self._running), num_steps=self._num_steps)
        self._emit(StepOutputs(outputs, stats, time.time()))


def _logprobs(token_id: int, k: int) -> LogprobsData:
    """The chosen token is second best; the best k are the tokens 97, chosen, 98, 99, ... without
    repeats.
    """
    best = [97 if token_id != 97 else 98, token_id, *(i for i in range(99, 200) if i != token_id)]
    best = best[: VOCAB_SIZE if k == -1 else k]
    return LogprobsData(
        [token_id, *best], [-0.5, *(-0.25 * (i + 1) for i in range(len(best)))], rank=2
    )


def _named(token_id: int, named: list[int]) -> LogprobsData:
    """Token i has rank i + 1 and log-probability -i / 8, the chosen one those of `_logprobs`."""
    chosen = _logprobs(token_id, 0)
    return LogprobsData(
        [token_id, *named],
        [*chosen.logprobs, *(-i / 8 for i in named)],
        chosen.rank,
        [i + 1 for i in named],
    )


def _byte_alphabet() -> list[str]:
    """The printable stand-ins that byte-level tokenizers use for the 256 bytes, in the order of the
    bytes.
    """
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]


def _write_json(path: Path, value: object) -> None:
    path.write_bytes(msgspec.json.encode(value))
