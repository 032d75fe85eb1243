"""What servers and notebooks may know about the model that is being served."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jengine.logits_processors import ProcessorInfo


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """`default_sampling_params` are keyword arguments of `SamplingParams`, from the model's
    generation config.

    `tokenizer_folder` holds tokenizer.json; None when the tokenizer came out of a GGUF file.
    """

    model: str
    served_model_names: tuple[str, ...]
    architecture: str
    model_type: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    dtype: str
    default_sampling_params: dict[str, Any] = field(default_factory=dict)
    tokenizer_folder: Path | None = None
    logits_processors: tuple[ProcessorInfo, ...] = ()
