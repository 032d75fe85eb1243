"""The few shapes a step is compiled for: (tokens, sequences)."""

from collections.abc import Sequence
from dataclasses import dataclass

from jengine.config import CompileConfig, SchedulerConfig


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A step of at most `num_tokens` packed tokens in at most `num_seqs` sequences."""

    num_tokens: int
    num_seqs: int

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.num_seqs}"


def build_buckets(compile_config: CompileConfig, scheduler: SchedulerConfig) -> tuple[Bucket, ...]:
    """Decode buckets (one token a sequence, powers of two) and mixed buckets (every sequence,
    growing by four).

    The largest mixed bucket is the scheduler's token budget, so that every plan has a bucket.
    """
    most_seqs, budget = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    decode = compile_config.decode_buckets or powers_of_two(most_seqs)
    mixed = compile_config.prefill_buckets or tuple(
        n for n in (budget // 16, budget // 4, budget) if n > most_seqs or n == budget
    )
    if max(decode) < most_seqs or max(mixed) < budget:
        raise ValueError(
            f"buckets must cover max_num_seqs ({most_seqs}) and max_num_batched_tokens ({budget})"
        )
    few = min(4, most_seqs)  # prefill of few sequences: most of its sampling rows would be padding
    buckets = {Bucket(n, n) for n in decode}
    buckets |= {Bucket(n, s) for n in mixed for s in (few, most_seqs)}
    return tuple(sorted(buckets))


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... and finally `limit` itself."""
    powers = [1 << i for i in range(limit.bit_length()) if 1 << i < limit]
    return (*powers, limit)


def pick_bucket(buckets: Sequence[Bucket], num_tokens: int, num_seqs: int) -> Bucket:
    """The cheapest bucket that holds the step; `buckets` is sorted."""
    for bucket in buckets:
        if bucket.num_tokens >= num_tokens and bucket.num_seqs >= num_seqs:
            return bucket
    raise ValueError(f"no bucket holds {num_tokens} tokens in {num_seqs} sequences")
