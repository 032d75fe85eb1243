"""From what a user passed to `CoreRequest`s: tokenising, filling defaults, and every check at the
door.

Shared by `AsyncEngine` and `LLM`. `prepare` may run in any thread. A request
that passes here cannot fail in the engine core, so the core has no validation of its own.
"""

import itertools
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import msgspec

from jengine.config import EngineConfig
from jengine.errors import InvalidRequestError, UnsupportedError
from jengine.front_end import read_chat_template
from jengine.grammar.checker import Checker, VocabularyFacts
from jengine.logits_processors import encode_arguments
from jengine.model_info import ModelInfo
from jengine.protocol import CoreRequest
from jengine.request import MAX_BANNED_IDS, SamplingParams
from jengine.structured_outputs import FIELD
from jengine.text.tokenizer import Tokenizer
from jengine.thinking_markers import find_markers

SEED_BITS = 63  # what a drawn seed holds: fits a signed 64-bit integer, as a user's seed does
INLINE_CHARS = 2048  # tokenising less than this takes under 0.5 ms: not worth a change of threads
_SEED_MASK = 2**64 - 1
_PROMPT_KEYS = frozenset({"prompt", "prompt_token_ids", "cache_salt"})


class TextPrompt(TypedDict, total=False):
    """`{"prompt": "text"}`, tokenised by the engine (vLLM)."""

    prompt: str
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """`{"prompt_token_ids": [...]}`; `prompt`, if given, is only handed back (vLLM)."""

    prompt_token_ids: list[int]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A validated request and the core requests that serve it, one for each of its `n` completions.

    `sampling` is a private copy with every default filled in: later changes to the caller's object
    have no effect.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling: SamplingParams
    arrival_time: float
    children: tuple[CoreRequest, ...]


class InputProcessor:
    """`draw_seed` gives the seed of a request that has none, so that each request has its own
    random key.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_info: ModelInfo,
        tokenizer: Tokenizer | None,
        draw_seed: Callable[[], int],
    ) -> None:
        self._config = config
        self._info = model_info
        self._tokenizer = tokenizer
        self._draw_seed = draw_seed
        self._serial = itertools.count()
        self._chat_template = read_chat_template(config.model.chat_template)
        self._checker = Checker(self._vocabulary_facts)

    def close(self) -> None:
        """End the process that checks grammars, if there is one."""
        self._checker.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `UnsupportedError` if the engine was started with `skip_tokenizer_init`."""
        if self._tokenizer is None:
            raise UnsupportedError(
                "the engine was started without a tokenizer (skip_tokenizer_init)"
            )
        return self._tokenizer

    def prepare(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str = "",
        add_special_tokens: bool = True,
    ) -> PreparedRequest:
        """Tokenise and validate. `InvalidRequestError` names the field and its limit.

        With `structured_outputs` it blocks while the grammar is checked: see `Checker.check`.
        """
        arrival_time = time.time()
        self._check_envelope(request_id, priority, cache_salt)
        sampling = checked_copy(sampling_params)
        text, token_ids, cache_salt = self._read_prompt(prompt, cache_salt, add_special_tokens)
        token_ids = self._fit_prompt(token_ids, sampling)
        sampling = self._fill_sampling(sampling, len(token_ids))
        grammar = self._check_grammar(sampling)
        seed = self._draw_seed() if sampling.seed is None else sampling.seed
        serial = next(self._serial)
        children = tuple(
            CoreRequest(
                request_id=core_request_id(request_id, index, sampling.n, serial),
                prompt_token_ids=token_ids,
                # One child computes the prompt's logprobs: its siblings have the same ones.
                sampling=sampling.clone(
                    n=1,
                    prompt_logprobs=sampling.prompt_logprobs if index == 0 else None,
                    structured_outputs=None,
                ),
                eos_token_ids=list(self._info.eos_token_ids),
                seed=(seed + index) & _SEED_MASK,
                priority=priority,
                cache_salt=cache_salt,
                arrival_time=arrival_time,
                grammar=grammar,
            )
            for index in range(sampling.n)
        )
        return PreparedRequest(request_id, text, token_ids, sampling, arrival_time, children)

    def encode_prompt(self, prompt: Any) -> list[int]:
        """Token ids of a prompt, checked against the vocabulary and the model's length."""
        return self._fit_prompt(
            self._read_prompt(prompt, "", add_special_tokens=True)[1], SamplingParams()
        )

    def render_chat(
        self,
        /,  # a template may have a variable called `self`
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation, by `chat_template`, else the engine's, else the model's."""
        template = self._chat_template if chat_template is None else chat_template
        return self.tokenizer.apply_chat_template(messages, chat_template=template, **kwargs)

    def _check_envelope(self, request_id: str, priority: int, cache_salt: str) -> None:
        if not isinstance(request_id, str) or not request_id:
            raise InvalidRequestError("request_id", "must be a non-empty string")
        if not isinstance(priority, int) or not -(2**63) <= priority < 2**63:
            raise InvalidRequestError("priority", f"must be a 64-bit integer, got {priority!r}")
        if priority != 0 and self._config.scheduler.policy != "priority":
            raise InvalidRequestError(
                "priority", "must be 0: the engine runs with scheduling policy 'fcfs'"
            )
        if not isinstance(cache_salt, str):
            raise InvalidRequestError(
                "cache_salt", f"must be a string, got {type(cache_salt).__name__}"
            )

    def _read_prompt(
        self, prompt: Any, cache_salt: str, add_special_tokens: bool
    ) -> tuple[str | None, list[int], str]:
        """Text (if any), token ids and cache salt of any form of prompt."""
        if isinstance(prompt, Mapping):
            unknown = sorted(str(key) for key in prompt.keys() - _PROMPT_KEYS)
            if unknown:
                raise InvalidRequestError(
                    "prompt", f"keys not supported by this engine: {', '.join(unknown)}"
                )
            cache_salt = prompt.get("cache_salt") or cache_salt
            text = prompt.get("prompt")
            if (ids := prompt.get("prompt_token_ids")) is not None:
                return text, _as_token_ids(ids), cache_salt
            if text is None:
                raise InvalidRequestError("prompt", "must hold 'prompt' or 'prompt_token_ids'")
            prompt = text
        if not isinstance(prompt, str):
            return None, _as_token_ids(prompt), cache_salt
        if self._tokenizer is None:
            raise InvalidRequestError(
                "prompt", "must be token ids: the engine was started with skip_tokenizer_init"
            )
        return (
            prompt,
            self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens),
            cache_salt,
        )

    def _fit_prompt(self, token_ids: list[int], sampling: SamplingParams) -> list[int]:
        """Truncate from the left if asked to, then check length and range."""
        limit = self._info.max_model_len
        if (keep := sampling.truncate_prompt_tokens) is not None:
            if keep > limit:
                raise InvalidRequestError(
                    "truncate_prompt_tokens",
                    f"must be at most {limit} (the model's length), got {keep}",
                )
            # -1 keeps what the model can take, less the one token that is to be generated.
            token_ids = token_ids[-(limit - 1 if keep == -1 else keep) :]
        if not token_ids:
            raise InvalidRequestError("prompt", "must not be empty")
        if len(token_ids) >= limit:
            raise InvalidRequestError(
                "prompt",
                f"has {len(token_ids)} tokens; the model's length is {limit}, "
                "and room for one generated token must be left",
            )
        vocab_size = self._info.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            bad = next(t for t in token_ids if not 0 <= t < vocab_size)
            raise InvalidRequestError(
                "prompt_token_ids", f"token id {bad} is outside the vocabulary [0, {vocab_size})"
            )
        return token_ids

    def _fill_sampling(self, sampling: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """Defaults that need the model, and the limits that the engine sets."""
        vocab_size = self._info.vocab_size
        sampling.check_vocab(vocab_size)
        if sampling.extra_args:
            encode_arguments(self._info.logits_processors, sampling.extra_args)
        for name in ("logprobs", "prompt_logprobs"):
            self._check_logprobs(name, getattr(sampling, name))
        if sampling.logprob_token_ids and self._config.logprobs_mode != "raw_logprobs":
            raise InvalidRequestError(
                "logprob_token_ids",
                f"needs logprobs_mode raw_logprobs, not {self._config.logprobs_mode}",
            )
        if self._tokenizer is None:
            if sampling.stop_strings or sampling.bad_words:
                raise InvalidRequestError(
                    "stop", "needs a tokenizer: the engine was started with skip_tokenizer_init"
                )
            sampling = sampling.clone(detokenize=False)
        markers = find_markers(sampling, self._config.reasoning_config, self._tokenizer)
        bad_word_ids = self._encode_bad_words(sampling.bad_words or ()) or sampling.bad_word_ids
        room = self._info.max_model_len - num_prompt_tokens
        max_tokens = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
        sampling = sampling.clone(
            max_tokens=max_tokens,
            min_tokens=min(sampling.min_tokens, max_tokens),
            bad_word_ids=bad_word_ids,
            thinking_markers=markers,
        )
        self._check_banned(sampling)
        return sampling

    def _check_grammar(self, sampling: SamplingParams) -> str:
        """The text for the engine of what the request asks for; empty without."""
        if sampling.structured_outputs is None:
            return ""
        if self._tokenizer is None:
            raise InvalidRequestError(
                FIELD, "needs a tokenizer: the engine was started with skip_tokenizer_init"
            )
        return self._checker.check(sampling.structured_outputs)

    def _vocabulary_facts(self) -> VocabularyFacts:
        tokenizer, info = self.tokenizer, self._info
        return VocabularyFacts(
            tokenizer.pieces.table,
            tokenizer.all_special_ids,
            list(info.eos_token_ids),
            info.vocab_size,
        )

    def _check_logprobs(self, name: str, value: int | None) -> None:
        limit = self._config.max_logprobs
        if value is None:
            return
        if value == -1 and limit != -1:
            raise InvalidRequestError(
                name,
                "-1 (whole vocabulary) needs an engine started with max_logprobs=-1; "
                f"the limit is {limit}",
            )
        limit = self._info.vocab_size if limit == -1 else limit
        if value > limit:
            raise InvalidRequestError(
                name, f"must be at most {limit} (max_logprobs of the engine), got {value}"
            )

    def _encode_bad_words(self, bad_words: Sequence[str]) -> list[list[int]] | None:
        """A word inside a text has other ids than at its start: both forms are banned."""
        if not bad_words or self._tokenizer is None:
            return None
        forms: list[list[int]] = []
        for word in bad_words:
            bare = word.lstrip()
            for text in (bare, f" {bare}"):
                ids = self._tokenizer.encode(text, add_special_tokens=False)
                if not bare or not ids:
                    raise InvalidRequestError("bad_words", f"{word!r} has no tokens")
                if ids not in forms:
                    forms.append(ids)
        return forms

    def _check_banned(self, sampling: SamplingParams) -> None:
        """The device holds a fixed number of ids that a request may forbid for a while."""
        num_stop = 0
        if sampling.min_tokens > 0:
            num_stop = len({*(sampling.stop_token_ids or ()), *self._info.eos_token_ids})
        if num_stop > MAX_BANNED_IDS:
            raise InvalidRequestError(
                "stop_token_ids",
                f"with min_tokens at most {MAX_BANNED_IDS} ids (end-of-sequence included), "
                f"got {num_stop}",
            )
        num_words = len(sampling.bad_word_ids or ())
        if num_stop + num_words > MAX_BANNED_IDS:
            raise InvalidRequestError(
                "bad_words",
                f"at most {MAX_BANNED_IDS} token sequences, with the stop ids that min_tokens "
                f"holds back, got {num_words} + {num_stop}",
            )


def has_constraint(params: Any) -> bool:
    """Wrong types have none: they are refused at once."""
    return isinstance(params, SamplingParams) and params.structured_outputs is not None


def is_short(prompt: Any) -> bool:
    """Whether `prompt` may be prepared on an event loop. Wrong types may: they fail at once."""
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    return not isinstance(text, str) or len(text) <= INLINE_CHARS


def core_request_id(request_id: str, index: int, n: int, serial: int) -> str:
    """Id of completion `index` in the engine core.

    The serial number keeps a request apart from an aborted one of the same id, whose last tokens
    may still be under way when a client tries again.
    """
    return f"{request_id}~{serial}" if n == 1 else f"{request_id}-{index}~{serial}"


def checked_copy(params: SamplingParams) -> SamplingParams:
    """A copy that has passed every check again, types included.

    `SamplingParams` is mutable and Python checks no types: `top_k=1.5` would only fail on the far
    side of the wire, in the engine core. Encoding and decoding here costs about 10 us and finds it
    first.
    """
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(
            "sampling_params", f"must be SamplingParams, got {type(params).__name__}"
        )
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidRequestError):
            raise error.__cause__ from None
        message, _, path = str(error).partition(" - at `$.")
        raise InvalidRequestError(path.rstrip("`") or "sampling_params", message) from None
    except (TypeError, OverflowError, RecursionError) as error:  # it has no msgpack form
        raise InvalidRequestError(_first_unpackable(params), str(error)) from None


def _first_unpackable(params: SamplingParams) -> str:
    """The name of the field that has no msgpack form."""
    for name in params.__struct_fields__:
        try:
            msgspec.msgpack.encode(getattr(params, name))
        except (TypeError, OverflowError, RecursionError):
            return name
    return "sampling_params"


def _as_token_ids(prompt: Any) -> list[int]:
    """Plain ints from any sequence of integers (lists, tuples, arrays)."""
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise InvalidRequestError(
            "prompt",
            "must be a string, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'",
        ) from None
