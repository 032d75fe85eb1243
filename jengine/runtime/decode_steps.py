"""How many decode steps one dispatch may hold on a device."""

from collections.abc import Iterable

from jengine.layers.param import ParamInfo
from jengine.models.decoder_config import DecoderConfig
from jengine.models.sparse import SparseConfig

DISPATCH_SECONDS = 8e-3  # a newcomer waits so long at most, and a stream jumps by so much
MAX_DECODE_STEPS = 8  # by then the host's share of a step is an eighth; more only delays newcomers
BYTES_PER_SECOND = 3e12  # an H100 copies at 3.0 TB/s


def bytes_of_one_token(parameters: Iterable[ParamInfo], cfg: DecoderConfig) -> int:
    """What a decode step of one sequence reads: of the experts, those of one token only."""
    is_sparse = isinstance(cfg, SparseConfig)
    share = cfg.moe.num_experts_per_tok / cfg.moe.num_experts if is_sparse else 1.0
    return int(
        sum(p.num_bytes * (share if "experts" in p.logical_axes else 1.0) for p in parameters)
    )


def choose_max_decode_steps(platform: str, bytes_read: int) -> int:
    """A power of two. A decode step takes at least the time that memory needs for what it reads
    (`bytes_of_one_token`): 5 ms for 8B parameters in bfloat16 (then 1), 0.4 ms for 0.6B (then 8).

    On CPU one: there steps are longer than what the host does between them.
    """
    if platform != "gpu":
        return 1
    num_steps = int(DISPATCH_SECONDS * BYTES_PER_SECOND / max(bytes_read, 1))
    return min(MAX_DECODE_STEPS, 1 << max(num_steps.bit_length() - 1, 0))
