"""What both engines do once their core is ready: check its greeting, and describe the model."""

from collections.abc import Iterable
from pathlib import Path

from jengine.config import EngineConfig
from jengine.errors import EngineDeadError
from jengine.loading.checkpoint import Checkpoint
from jengine.model_info import ModelInfo
from jengine.protocol import PROTOCOL_VERSION, CoreReady
from jengine.text.tokenizer import Tokenizer

# generation_config.json -> SamplingParams, the fields that vLLM takes over
_SAMPLING_DEFAULTS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}


def check_greeting(ready: CoreReady) -> None:
    """Raise `EngineDeadError` if the core speaks another version of the protocol."""
    if ready.protocol_version != PROTOCOL_VERSION:
        raise EngineDeadError(
            f"the engine core speaks protocol version {ready.protocol_version}, "
            f"the front end {PROTOCOL_VERSION}"
        )


def read_chat_template(source: str | None) -> str | None:
    """`source` is a file that holds a Jinja template, or the template itself."""
    if source is None or "\n" in source or "{" in source:
        return source
    return Path(source).expanduser().read_text("utf-8")


def build_model_info(
    config: EngineConfig, checkpoint: Checkpoint, tokenizer: Tokenizer | None, ready: CoreReady
) -> ModelInfo:
    """Combine configuration, checkpoint and what the core said when it was ready."""
    hf_config, generation = checkpoint.hf_config, checkpoint.generation_config
    eos = (
        _ids(generation.get("eos_token_id"))
        or _ids(hf_config.get("eos_token_id"))
        or _ids(tokenizer.eos_token_id if tokenizer else None)
    )
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        eos = (
            *eos,
            tokenizer.eos_token_id,
        )  # chat models end a turn with it, whatever the config says
    defaults = {
        ours: generation[theirs]
        for theirs, ours in _SAMPLING_DEFAULTS.items()
        if generation.get(theirs) is not None
    }
    return ModelInfo(
        model=config.model.model,
        served_model_names=config.model.served_model_name or (config.model.model,),
        architecture=next(iter(hf_config.get("architectures") or ()), ""),
        model_type=hf_config.get("model_type", ""),
        vocab_size=ready.vocab_size,
        max_model_len=ready.max_model_len,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        bos_token_id=tokenizer.bos_token_id if tokenizer else hf_config.get("bos_token_id"),
        pad_token_id=tokenizer.pad_token_id if tokenizer else hf_config.get("pad_token_id"),
        dtype=ready.dtype or config.model.dtype,
        default_sampling_params=defaults if config.model.generation_config == "auto" else {},
        tokenizer_folder=_tokenizer_folder(config, checkpoint),
        logits_processors=tuple(ready.logits_processors),
    )


def _ids(value: int | Iterable[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _tokenizer_folder(config: EngineConfig, checkpoint: Checkpoint) -> Path | None:
    folder = Path(config.model.tokenizer) if config.model.tokenizer else checkpoint.path
    return folder if (folder / "tokenizer.json").is_file() else None
