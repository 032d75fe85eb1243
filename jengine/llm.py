"""LLM: offline batches and notebooks, with the names, arguments and results of vLLM's class of that
name.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

from tqdm.auto import tqdm

from jengine.beam_search import BeamSearch, BeamSearchOutput, BeamSearchParams, check_search
from jengine.config import Dtype, EngineConfig, cache_root
from jengine.core_client import ENGINE_CORE
from jengine.errors import InvalidRequestError, UnsupportedError
from jengine.input_processor import Prompt, TokensPrompt
from jengine.llm_arguments import Message, as_conversations, as_prompts, one_each
from jengine.metrics_reader import Metric, build_metrics
from jengine.model_info import ModelInfo
from jengine.outputs import RequestOutput
from jengine.progress import Progress, run_with_progress
from jengine.request import RequestOutputKind, SamplingParams
from jengine.sync_engine import SyncEngine
from jengine.teacher_forcing import Completion, passes, read_completions
from jengine.text.tokenizer import Tokenizer
from jengine.vllm_compat import drop_vllm_arguments

if TYPE_CHECKING:
    import jax
    import numpy as np
    from flax import nnx

    from jengine.engine import EngineCore

T = TypeVar("T")


class LLM:
    """A model, its KV cache, and an engine that batches requests over both.

    Args:
        model: Folder, .gguf file, pulled name or Hub id. tokenizer: Where to read the tokenizer, if
        not from the model. skip_tokenizer_init: Take and give token ids only. dtype: Of parameters
        and activations; "auto" follows the checkpoint, whose packed weights stay packed unless
        `dequantize=True` is among kwargs. seed: Makes a run repeatable: requests
        without a seed of their own get one drawn from it, in order. gpu_memory_utilization: Share
        of the device's memory, in (0, 1], that the engine may plan with. max_model_len: Longest
        prompt plus completion, in tokens; None for the model's own. hf_overrides: Entries that
        replace those of the model's config.json. chat_template: Jinja source or file that replaces
        the model's own. core_factory: The engine core, "module:name" (tests replace it). kwargs:
        Any field of `EngineConfig` and its parts (`max_num_seqs`, `enable_prefix_caching`, ...).
        Arguments
            of `vllm.LLM` that mean nothing here are accepted, or refused where they would change
            the results.

    Raises:
        ModelNotFoundError, LoadError, UnsupportedError: The model cannot be opened or run here.
        EngineDeadError: The engine core failed while starting.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        dtype: Dtype = "auto",
        seed: int | None = 0,
        gpu_memory_utilization: float = 0.92,
        max_model_len: int | None = None,
        hf_overrides: dict[str, Any] | None = None,
        chat_template: str | None = None,
        disable_log_stats: bool = True,
        core_factory: str = ENGINE_CORE,
        **kwargs: Any,
    ) -> None:
        if callable(hf_overrides):
            raise UnsupportedError("hf_overrides must be a dict")
        config = EngineConfig.from_kwargs(
            model,
            tokenizer=tokenizer,
            skip_tokenizer_init=skip_tokenizer_init,
            dtype=dtype,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
            max_model_len=max_model_len,
            hf_overrides=hf_overrides,
            chat_template=chat_template,
            disable_log_stats=disable_log_stats,
            **drop_vllm_arguments(kwargs),
        )
        self._start(config, core_factory)

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """An engine of exactly this configuration."""
        llm = cls.__new__(cls)
        llm._start(config, ENGINE_CORE)
        return llm

    def _start(self, config: EngineConfig, core_factory: str) -> None:
        self._num_devices = config.parallel.num_ranks
        self._engine = SyncEngine(config, core_factory)
        self._num_requests = 0
        self._enqueued: list[str] = []  # what `wait_for_completion` waits for

    # --- generating

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Complete one prompt or many, all running together; the results are in the order of the
        prompts.

        A prompt is text, a list of token ids, or a dict `{"prompt": ...}` / `{"prompt_token_ids":
        [...]}`. `sampling_params` and `priority` (lower runs first) are one for all, or one for
        each prompt; without sampling parameters the model's own defaults hold. Raises
        `InvalidRequestError` before anything starts, and `EngineDeadError`. Ctrl-C aborts the
        requests and leaves the engine usable.
        """
        request_ids = self._add(
            as_prompts(prompts), sampling_params, lora_request, priority, tokenization_kwargs
        )
        return self._run(request_ids, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: Literal["auto", "string", "openai"] = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages) or many. `chat_template_kwargs` go to the
        template.

        `chat_template_content_format` is accepted for vLLM's sake: messages reach the template as
        they are.
        """
        prompts = [
            self._render(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in as_conversations(messages)
        ]
        return self._run(
            self._add(prompts, sampling_params, lora_request, priority, None), use_tqdm
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best completions of each prompt, by their log-probabilities. Needs twice
        as many `logprobs` as the engine allows a request (`max_logprobs`) for the width.
        """
        texts = [self._engine.inputs.encode_prompt(prompt) for prompt in as_prompts(prompts)]
        config = self._core.runner.config
        check_search(params, texts, self.model_info, config)
        searches = [BeamSearch(text, params, self.model_info.eos_token_ids) for text in texts]
        one_token = params.one_token()
        for _ in tqdm(range(params.max_tokens), desc="Beam search", disable=not use_tqdm):
            beams: list[Prompt] = [beam.tokens for search in searches for beam in search.beams]
            if not beams:
                break
            outputs = self.generate(beams, one_token, use_tqdm=False)
            candidates = iter([(output.outputs[0].logprobs or [{}])[0] for output in outputs])
            for search in searches:
                search.advance([next(candidates) for _ in search.beams])
        tokenizer = None if config.model.skip_tokenizer_init else self.get_tokenizer()
        return [search.output(tokenizer) for search in searches]

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[str]:
        """Start requests as `generate` does, but do not wait for them. Returns their ids."""
        request_ids = self._add(
            as_prompts(prompts), sampling_params, lora_request, priority, tokenization_kwargs
        )
        self._enqueued += request_ids
        return request_ids

    def wait_for_completion(self, *, use_tqdm: Progress = True) -> list[RequestOutput]:
        """Results of everything enqueued since the last call, in order."""
        request_ids, self._enqueued = self._enqueued, []
        return self._run(request_ids, use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses when it is given none: the model's generation config over vLLM's
        defaults.
        """
        return SamplingParams(**self.model_info.default_sampling_params)

    # --- control

    @property
    def model_info(self) -> ModelInfo:
        """Name, architecture, limits and special ids of the model."""
        return self._engine.model_info

    @property
    def memory_plan(self) -> str:
        """Where the memory goes: parameters, activations, pages."""
        return self._engine.ready.memory_plan

    def wait_until_compiled(self) -> int:
        """Wait for executables that are still being compiled while larger ones serve; returns how
        many there are. Before a measurement; else nobody needs to wait.
        """
        return int(self._engine.call("wait_until_compiled"))

    def get_tokenizer(self) -> Tokenizer:
        return self._engine.inputs.tokenizer

    def get_world_size(self, include_dp: bool = True) -> int:
        """Number of devices."""
        return self._num_devices

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. False if pages are in use and nothing was done."""
        return bool(self._engine.call("reset_prefix_cache"))

    def get_metrics(self) -> list[Metric]:
        """Gauges and counters as of the last step, under vLLM's Prometheus names."""
        return build_metrics(self._engine.stats, self.model_info.served_model_names[0])

    def start_profile(self, trace_dir: str | Path | None = None) -> Path:
        """Start a `jax.profiler` trace (for XProf or Perfetto). Returns the folder it will be
        written to.
        """
        import jax.profiler

        folder = Path(trace_dir) if trace_dir is not None else cache_root() / "profiles"
        jax.profiler.start_trace(str(folder))
        return folder

    def stop_profile(self) -> None:
        """End the trace and write it."""
        import jax.profiler

        jax.profiler.stop_trace()

    def close(self) -> None:
        """Stop the engine and free the device. Idempotent; also done when the object or the program
        ends.
        """
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- the live objects, for notebooks

    @property
    def params(self) -> "dict[str, jax.Array]":
        """Parameters by path: the very arrays that the next step reads."""
        return self._core.runner.params

    @property
    def model(self) -> "nnx.Module":
        """The NNX module, with the live parameters in it."""
        return self._core.runner.model

    @property
    def step_fn(self) -> Callable[..., Any]:
        """The pure function of one engine step, as it is compiled."""
        return self._core.runner.step_fn

    def hidden_states(self, prompt: Prompt) -> "jax.Array":
        """Activations `[T, D]` after the last norm, for the T tokens of one prompt."""
        return self._core.runner.hidden_states(self._engine.inputs.encode_prompt(prompt))

    def logprobs(self, completions: Sequence[Completion]) -> "list[np.ndarray]":
        """Log-probabilities f32[number of tokens] of each completion, in order: those of every
        output of a `RequestOutput`, or of the token ids beside a prompt.

        Computed by teacher forcing: `logprobs_fn` on the live parameters, outside the engine's
        cache. They are the raw ones that `generate` returns with `logprobs=0`; where a row's bits
        do not depend on its batch (`jengine determinism`), bit for bit. Not called `score`: that is
        vLLM's name for comparing two texts by a cross-encoder.
        """
        runner = self._core.runner
        pairs = list(read_completions(completions, self._engine.inputs, self.model_info))
        texts = [prompt + completion for prompt, completion in pairs]
        scores: list[np.ndarray] = []
        for together in passes(texts, runner.config.scheduler.max_num_batched_tokens):
            scores += runner.logprobs(together)
        return [
            scores_T[len(prompt) :] for (prompt, _), scores_T in zip(pairs, scores, strict=True)
        ]

    def logprobs_fn(self) -> "Callable[[Mapping[str, jax.Array], Any, Any], jax.Array]":
        """The pure function behind `logprobs`, for `jax.grad`, `jax.jit` and training.

        `fn(params, token_ids i32[T], lengths i32[S]) -> f32[T]`. `params` is a dict as
        `LLM.params`; texts lie one after the other, rows past the last are padding. Entry t is the
        log-probability of token t given those before it in its text, 0 for first tokens and
        padding.
        """
        return self._core.runner.logprobs_fn()

    def apply_model(self, func: "Callable[[nnx.Module], T]") -> list[T]:
        """`func` of the model, in a list of one: there is one worker."""
        return [func(self.model)]

    @property
    def _core(self) -> "EngineCore":
        return cast("EngineCore", self._engine.core)

    # --- helpers

    def _render(self, conversation: Sequence[Message], **kwargs: Any) -> TokensPrompt:
        """The template writes special tokens itself: none are added by the tokenizer."""
        text = self._engine.inputs.render_chat(list(conversation), **kwargs)
        return {
            "prompt": text,
            "prompt_token_ids": self.get_tokenizer().encode(text, add_special_tokens=False),
        }

    def _add(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        lora_request: None,
        priority: int | Sequence[int] | None,
        tokenization_kwargs: dict[str, Any] | None,
    ) -> list[str]:
        """Validate all, then start all: either every request runs or none."""
        if lora_request is not None:
            raise UnsupportedError("lora_request is not supported by this version")
        options = dict(tokenization_kwargs or {})
        add_special_tokens = bool(options.pop("add_special_tokens", True))
        if options:
            raise InvalidRequestError(
                "tokenization_kwargs", f"not supported: {', '.join(sorted(options))}"
            )
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        all_params = one_each(sampling_params, SamplingParams, len(prompts), "sampling_params")
        priorities = one_each(0 if priority is None else priority, int, len(prompts), "priority")
        first = self._num_requests
        prepared = [
            self._engine.inputs.prepare(
                prompt,
                params.clone(output_kind=RequestOutputKind.FINAL_ONLY),
                str(first + i),
                priority=level,
                add_special_tokens=add_special_tokens,
            )
            for i, (prompt, params, level) in enumerate(
                zip(prompts, all_params, priorities, strict=True)
            )
        ]
        self._engine.add(prepared)
        self._num_requests += len(prepared)
        return [request.request_id for request in prepared]

    def _run(self, request_ids: list[str], use_tqdm: Progress) -> list[RequestOutput]:
        return run_with_progress(self._engine, request_ids, use_tqdm)
