"""Where a row's bits can be kept from depending on its batch on a GPU (docs/determinism.md)."""

from typing import Any

from jengine.kv_spec import KVKind
from jengine.layers.norm import LayerNorm, RMSNorm
from jengine.pallas_kernels.platform import is_hopper, platform

MAX_RANKS = 2  # two summands have one order; of more, libraries choose it by the message's size


def resolve_batch_invariant(
    wanted: bool | None, model: Any, cfg: Any, num_ranks: int = 1, *, experts_move: bool = False
) -> bool:
    """Whether programs for a GPU are traced so (`platform.is_batch_invariant`). `model` is the
    family's class or module.

    Raises `ValueError` if it is `wanted` and cannot be had.
    """
    if platform() == "cpu":
        return False  # nothing has to be done for it
    missing = what_is_missing(model, cfg)
    if num_ranks > MAX_RANKS:
        missing = f"sums over {num_ranks} devices"
    elif experts_move:
        missing = "experts that move"
    if wanted and missing is not None:
        raise ValueError(f"batch_invariant: cannot be promised for {missing} on this device")
    return missing is None if wanted is None else wanted


def what_is_missing(model: Any, cfg: Any) -> str | None:
    """What of a model has no kernel that keeps a row's bits, or None."""
    if not is_hopper():
        return "other GPUs than Hopper"
    if cfg.dtype != "bfloat16":
        return f"a model in {cfg.dtype}"
    kinds = {spec.kind for spec in model.kv_specs(cfg)}
    if other := kinds - {KVKind.FULL, KVKind.SLIDING_WINDOW}:
        return f"caches of kind {', '.join(sorted(kind.name for kind in other))}"
    if issubclass(getattr(model, "norm_class", RMSNorm), LayerNorm):
        return "layer normalisation"
    return None
