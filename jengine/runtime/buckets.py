"""The few shapes a step is compiled for: (tokens, sequences)."""

from collections.abc import Sequence
from dataclasses import dataclass

from jengine.config import CompileConfig, SchedulerConfig


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """A step of at most `num_tokens` packed tokens in at most `num_seqs` sequences."""

    num_tokens: int
    num_seqs: int

    @property
    def is_decode(self) -> bool:
        """Holds only steps with one token of each sequence: their kernels are simpler."""
        return self.num_tokens == self.num_seqs

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.num_seqs}"


LONG_STEP = 4096  # tokens; between this and half of it padding costs up to 50 ms of a GPU's time
FEW_SEQS = 8  # prefill of few sequences: most of its sampling rows would be padding


def build_buckets(
    compile_config: CompileConfig, scheduler: SchedulerConfig, growth: int = 4
) -> tuple[Bucket, ...]:
    """Decode buckets (one token a sequence, powers of two) and mixed buckets (any plan), whose
    tokens grow by `growth` (long ones by less) up to the scheduler's budget: every plan has a
    bucket.

    Small steps of few sequences have mixed buckets of their own where `growth` is fine: a prompt of
    100 tokens must not pay for 500.
    """
    most_seqs, budget = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    few = min(FEW_SEQS, most_seqs)
    decode = compile_config.decode_buckets or powers_of_two(most_seqs)
    sizes = compile_config.prefill_buckets or _ladder(budget, most_seqs, growth)
    if max(decode) < most_seqs or max(sizes) < budget:
        raise ValueError(
            f"buckets must cover max_num_seqs ({most_seqs}) and max_num_batched_tokens ({budget})"
        )
    # A mixed bucket has more tokens than sequences, or it would be a decode bucket.
    largest = max(*sizes, most_seqs + 1)
    buckets = {Bucket(n, n) for n in decode} | {Bucket(largest, most_seqs)}
    buckets |= {Bucket(n, s) for n in sizes for s in (few, most_seqs) if n > s}
    return tuple(sorted(buckets))


def _ladder(budget: int, most_seqs: int, growth: int) -> tuple[int, ...]:
    smallest = max(budget // 128, 64) if growth == 2 else max(budget // 16, most_seqs + 1)
    sizes = [budget]
    while sizes[-1] // growth >= smallest:
        sizes.append(sizes[-1] // growth)
    if growth == 2:
        sizes += [3 * size // 4 for size in sizes if size >= LONG_STEP]
    return tuple(sizes)


def essential_buckets(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """What must be ready before the first request: one that holds every plan, and the largest and
    smallest for decoding, so that first service is not silly. In the order to prepare them.
    """
    decode = [bucket for bucket in buckets if bucket.is_decode]
    chosen = (max(b for b in buckets if not b.is_decode), max(decode), min(decode))
    return tuple(dict.fromkeys(chosen))


def preparation_order(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """Essential buckets first, then mixed ones, then decode ones, small before large.

    Mixed first: until they are there a prompt of a thousand tokens pays for the largest of all, a
    decode step of a few sequences only for one of many, which costs much less.
    """
    rest = sorted(buckets, key=lambda bucket: (bucket.is_decode, bucket))
    return tuple(dict.fromkeys((*essential_buckets(buckets), *rest)))


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4, ... and finally `limit` itself."""
    powers = [1 << i for i in range(limit.bit_length()) if 1 << i < limit]
    return (*powers, limit)


def pick_bucket(buckets: Sequence[Bucket], num_tokens: int, num_seqs: int) -> Bucket:
    """The cheapest bucket that holds the step; `buckets` is sorted."""
    for bucket in buckets:
        fits = bucket.num_tokens >= num_tokens and bucket.num_seqs >= num_seqs
        if fits and (num_tokens == num_seqs or not bucket.is_decode):
            return bucket
    raise ValueError(f"no bucket holds {num_tokens} tokens in {num_seqs} sequences")
