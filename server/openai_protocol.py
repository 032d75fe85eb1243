"""Requests of the OpenAI API, with vLLM's extra fields, as msgspec structs.

Fields that are not listed are ignored (SDKs add new ones all the time). Fields that are listed in
`refused` are ones that change what the answer means and that this version cannot honour: they are
refused, naming the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from jengine.errors import InvalidRequestError
from jengine.request import RepetitionDetectionParams, RequestOutputKind, SamplingParams
from jengine.server.openai_constraints import constraint_field, read_constraint
from jengine.server.openai_render import Top
from jengine.server.request_limits import check_template_variables

COMPLETION_MAX_TOKENS = 16
MAX_PROMPTS = 128
MAX_CHOICES = 128  # prompts times n
MAX_MESSAGES = 2048
MAX_TOOLS = 128

# What a model's generation_config may suggest, and what vLLM takes from it.
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingRequest(msgspec.Struct, kw_only=True):
    """Fields that completions and chat completions share. None: the model's default, else
    SamplingParams'.
    """

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logit_bias: dict[int, float] | None = None
    echo: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int = 0
    request_id: str | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    vllm_xargs: dict[str, Any] | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    thinking_token_budget: int | None = None
    use_beam_search: bool = False
    length_penalty: float | None = None
    # Recognised, and refused when they ask for something.
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    prompt_embeds: Any = None
    kv_transfer_params: Any = None
    logits_processors: Any = None

    def check(self, extra: Mapping[str, object]) -> None:
        """Refuse what cannot be honoured, and check what `SamplingParams` does not."""
        refused: dict[str, object] = {
            "guided_json": self.guided_json,
            "guided_regex": self.guided_regex,
            "guided_choice": self.guided_choice,
            "guided_grammar": self.guided_grammar,
            "prompt_embeds": self.prompt_embeds,
            "kv_transfer_params": self.kv_transfer_params,
            "logits_processors": self.logits_processors,
            "length_penalty": not self.use_beam_search and self.length_penalty not in (None, 1.0),
            **extra,
        }
        for name, value in refused.items():
            if value:
                raise InvalidRequestError(name, "is not supported by this server")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "is only allowed with stream=true")

    @property
    def constraint_field(self) -> str:
        """What errors call the constraint, if not as we do."""
        return constraint_field(self.response_format)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_continuous_usage(self) -> bool:
        return self.includes_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def build_sampling(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """`defaults` are the model's own suggestions; a field of the request wins over them."""
        if self.use_beam_search:  # nothing is drawn: for the books
            return SamplingParams(
                n=1 if self.n is None else self.n,
                max_tokens=max_tokens,
                skip_special_tokens=self.skip_special_tokens,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        fields: dict[str, Any] = {
            name: defaults[name] for name in MODEL_DEFAULTS if name in defaults
        }
        for name in (
            *MODEL_DEFAULTS,
            *("n", "seed", "frequency_penalty", "presence_penalty"),
        ):
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        return SamplingParams(
            **fields,
            stop=self.stop or None,
            stop_token_ids=self.stop_token_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            max_tokens=max_tokens,
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            logprob_token_ids=self.logprob_token_ids or None,
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words or None,
            logit_bias=self.logit_bias,
            extra_args=self.vllm_xargs,
            repetition_detection=self.repetition_detection,
            thinking_token_budget=self.thinking_token_budget,
            structured_outputs=read_constraint(self.response_format, self.structured_outputs),
            output_kind=(RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY),
        )


class CompletionRequest(SamplingRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]  # of one kind: str | [str] | [int] | [[int]]
    logprobs: int | None = None
    add_special_tokens: bool = True
    suffix: str | None = None
    best_of: int | None = None

    def check_completion(self) -> None:
        best_of = self.best_of is not None and self.best_of != (self.n or 1)
        self.check({"suffix": self.suffix, "best_of": best_of})
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs", "is not available with stream=true")
        if self.echo and self.logprob_token_ids:
            raise InvalidRequestError("logprob_token_ids", "cannot be combined with echo")
        if self.stream and self.echo and self.logprobs is not None and (self.n or 1) > 1:
            raise InvalidRequestError("n", "must be 1 to stream echo with logprobs")
        num_prompts = len(self.prompts())
        if num_prompts > MAX_PROMPTS or num_prompts * max(self.n or 1, 1) > MAX_CHOICES:
            raise InvalidRequestError(
                "prompt", f"at most {MAX_PROMPTS} prompts and {MAX_CHOICES} choices in all"
            )

    @property
    def top(self) -> Top | None:
        """Whose log-probabilities are shown; None: nobody's."""
        return self.logprob_token_ids or self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry for each prompt."""
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        kinds = {type(item) for item in prompt}
        if not prompt:
            raise InvalidRequestError("prompt", "must not be empty")
        if len(kinds) > 1:
            raise InvalidRequestError("prompt", "must be one of: str, [str], [int], [[int]]")
        return [prompt] if kinds == {int} else prompt


class TextPart(msgspec.Struct):
    """An element of a message's content."""

    type: str
    text: str | None = None


class Message(msgspec.Struct):
    """A turn of a conversation. Templates of models that call tools or reason read the last four
    fields.
    """

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    def render(self, index: int) -> dict[str, Any]:
        """As templates take it: text parts joined by line breaks."""
        content = self.content
        if isinstance(content, list):
            for number, part in enumerate(content):
                if part.type not in ("text", "input_text") or part.text is None:
                    raise InvalidRequestError(
                        f"messages[{index}].content[{number}]",
                        f"content of type {part.type!r} is not supported: this model takes text",
                    )
            content = "\n".join(part.text or "" for part in content)
        result: dict[str, Any] = {"role": self.role, "content": content or ""}
        for name in ("name", "tool_call_id", "tool_calls", "reasoning", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                result[name] = value
        return result


class ChatRequest(SamplingRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: list[str] | None = None
    store: bool | None = None
    web_search_options: Any = None
    prediction: Any = None

    @property
    def may_call(self) -> bool:
        """Whether the model is shown the tools. Those that may not be called change nothing."""
        return bool(self.tools) and self.tool_choice != "none"

    def check_chat(self, *, trust_template: bool, takes_tools: bool = False) -> None:
        self.check(
            {
                "audio": self.audio,
                "modalities": self.modalities not in (None, ["text"]),
                "store": self.store,
                "web_search_options": self.web_search_options is not None,
                "prediction": self.prediction is not None,
                "functions": self.functions,
                "function_call": self.function_call not in (None, "none"),
            }
        )
        self.check_conversation(trust_template=trust_template)
        self._check_tools(takes_tools)
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs", "needs logprobs=true")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs", "is not available with stream=true")

    def _check_tools(self, takes_tools: bool) -> None:
        if self.tool_choice not in (None, "none", "auto"):
            raise InvalidRequestError(
                "tool_choice", "must be none or auto: this server forces no calls"
            )
        if self.may_call and not takes_tools:
            raise InvalidRequestError(
                "tools", "need a server with --enable-auto-tool-choice and --tool-call-parser"
            )
        if len(self.tools or ()) > MAX_TOOLS:
            raise InvalidRequestError("tools", f"at most {MAX_TOOLS} tools")

    def check_conversation(self, *, trust_template: bool) -> None:
        if not self.messages:
            raise InvalidRequestError("messages", "must not be empty")
        if len(self.messages) > MAX_MESSAGES:
            raise InvalidRequestError("messages", f"at most {MAX_MESSAGES} messages")
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequestError(
                "continue_final_message", "cannot be combined with add_generation_prompt"
            )
        if self.chat_template is not None and not trust_template:
            raise InvalidRequestError(
                "chat_template", "requests may not bring templates (--trust-request-chat-template)"
            )
        check_template_variables("chat_template_kwargs", self.chat_template_kwargs)

    @property
    def top(self) -> Top | None:
        """Whose log-probabilities are shown; None: nobody's."""
        return self.logprob_token_ids or ((self.top_logprobs or 0) if self.logprobs else None)

    def template_arguments(self) -> dict[str, Any]:
        """Arguments of `AsyncEngine.render_chat` after the messages."""
        open_turn = self.add_generation_prompt
        if open_turn is None:
            open_turn = not self.continue_final_message
        effort = self.reasoning_effort
        arguments: dict[str, Any] = {
            **({} if effort is None else {"reasoning_effort": effort}),
            **(self.chat_template_kwargs or {}),
            "add_generation_prompt": open_turn,
            "continue_final_message": self.continue_final_message,
        }
        if self.chat_template is not None:
            arguments["chat_template"] = self.chat_template
        if self.may_call:
            arguments["tools"] = self.tools
        if self.documents is not None:
            arguments["documents"] = self.documents
        return arguments


class TokenizeTextRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize with `prompt`."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(ChatRequest, kw_only=True):
    """POST /tokenize with `messages`: what the chat endpoint would see."""

    return_token_strs: bool | None = False


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


class ErrorBody(msgspec.Struct):
    """What every refusal carries."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct):
    error: ErrorBody
