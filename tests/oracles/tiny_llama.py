"""Tiny random Llama checkpoints in Hugging Face's own format, with a tokenizer trained on the spot.

Nothing is cached: each call writes a whole folder (about 0.2 s) that any loader can open.
"""

import copy
import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.utils import logging

logging.disable_progress_bar()
# On busy cores, threads that wait for each other made a tiny model a hundred times slower.
torch.set_num_threads(1)

VOCAB_SIZE = 512  # of the model; the tokenizer stops at fewer, as with many real models
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "The quick brown fox jumps over the lazy dog. It's 12:30; we'll meet at 7, won't we?",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n\tprint(i, add(i, 2 * i))\n",
    "naïve café über straße — “quotes” … ½ ² 世界你好 こんにちは 안녕하세요 привет мир 😀🎉👩‍👧",
)


def make_tiny_llama(
    path: Path,
    *,
    seed: int = 0,
    max_shard_size: str = "5GB",
    family: str = "Llama",
    **config: Any,
) -> transformers.PreTrainedModel:
    """Write a float32 checkpoint to `path` and return the transformers model, in eval mode.

    `family` names the transformers classes; `config` overrides the fields of its config. Every
    parameter is random, biases and norms too, so that a swapped or forgotten one shows. A small
    `max_shard_size` ("20KB") gives several files and an index.
    """
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **copy.deepcopy(config),  # transformers adds to the dicts it is given
    }
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = model_class(model_class.config_class(**fields)).eval().float()
    randomise(model, seed)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    save_tiny_tokenizer(path)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights of a scale that keeps activations near one, so that errors of rounding stay small."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(parameter.mean() + 0.2 * noise)  # Gemma's scales are 1 + these
        elif parameter.ndim == 1 or name.endswith("_bias"):  # of stacked experts
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # of checkpoints: a parameter but in name
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))


def train_tiny_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE: any text can be encoded, and most characters beyond ASCII take several
    tokens.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save_tiny_tokenizer(path: Path, **config: Any) -> None:
    """Write tokenizer.json and tokenizer_config.json; `config` overrides fields of the latter."""
    path.mkdir(parents=True, exist_ok=True)
    train_tiny_tokenizer().save(str(path / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        **config,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(fields), "utf-8")
