"""What benchmarks send: random token ids as vLLM's `random` data set makes them, or prompts from a
file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jengine.errors import InvalidRequestError

SHAREGPT_MIN_TOKENS = 4
LOW_ID = 100  # below are special tokens and single bytes in most vocabularies


@dataclass(frozen=True, slots=True)
class Sample:
    """One request. A prompt in text has `prompt_len` 0 until the server has counted its tokens."""

    prompt: str | list[int]
    prompt_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class RandomShape:
    """Lengths are drawn uniformly from `len * (1 - ratio)` to `len * (1 + ratio)`."""

    input_len: int
    output_len: int
    range_ratio: float = 0.0
    prefix_len: int = 0


def random_samples(count: int, shape: RandomShape, vocab_size: int, seed: int) -> list[Sample]:
    """All samples share a prefix of `prefix_len` tokens; the rest is random."""
    if not 0.0 <= shape.range_ratio < 1.0:
        raise InvalidRequestError("random-range-ratio", "must be in [0, 1)")
    rng = np.random.default_rng(seed)
    low = LOW_ID if vocab_size > 2 * LOW_ID else 0
    prefix = rng.integers(low, vocab_size, shape.prefix_len).tolist()
    samples: list[Sample] = []
    for _ in range(count):
        num_in = _draw(rng, shape.input_len, shape.range_ratio)
        num_out = _draw(rng, shape.output_len, shape.range_ratio)
        ids = prefix + rng.integers(low, vocab_size, num_in).tolist()
        samples.append(Sample(ids, len(ids), num_out))
    return samples


def file_samples(name: str, path: Path, count: int, output_len: int | None) -> list[Sample]:
    """`sharegpt`: a JSON list of conversations; `custom`: JSON lines with `prompt` (and
    `output_tokens`).
    """
    text = path.read_text(encoding="utf-8")
    if name == "sharegpt":
        samples = [
            s for entry in json.loads(text) if (s := _sharegpt(entry, output_len)) is not None
        ]
    else:
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        samples = [
            Sample(row["prompt"], 0, output_len or int(row.get("output_tokens", 256)))
            for row in rows
        ]
    if not samples:
        raise InvalidRequestError("dataset-path", f"{path} holds no usable prompts")
    return [samples[i % len(samples)] for i in range(count)]


def _sharegpt(entry: dict[str, Any], output_len: int | None) -> Sample | None:
    turns = entry.get("conversations") or entry.get("conversation") or []
    if len(turns) < 2:
        return None
    prompt, answer = turns[0]["value"], turns[1]["value"]
    # Four characters a token: the length only decides how much is generated.
    length = output_len or len(answer) // 4
    return Sample(prompt, 0, length) if length >= SHAREGPT_MIN_TOKENS else None


def _draw(rng: np.random.Generator, length: int, ratio: float) -> int:
    low, high = int(length * (1 - ratio)), int(length * (1 + ratio))
    return max(1, int(rng.integers(low, high + 1)))
