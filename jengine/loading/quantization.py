"""What config.json says of packed weights, and what becomes of them: they stay as they are on the
device, or are read as floats.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jengine.config import QUANT_METHODS, ModelArgs
from jengine.errors import LoadError
from jengine.loading.block_scales import BlockScaledSource, PackedSource
from jengine.loading.mxfp4 import Mxfp4Source

if TYPE_CHECKING:
    from jengine.loading.checkpoint import TensorSource

FIELD = "quantization_config"
METHODS = {  # by `model_type`
    "deepseek_v3": "fp8",
    "deepseek_v32": "fp8",
    "deepseek_v4": "fp8",
    "gpt_oss": "mxfp4",
    "kimi_k2": "fp8",
}
STAY_PACKED = frozenset({"deepseek_v4", "gpt_oss"})


def open_quantised(
    hf: Mapping[str, Any], tensors: "TensorSource | None", args: ModelArgs
) -> tuple[dict[str, Any], "TensorSource | None"]:
    """(config.json, tensors) that agree: of packed weights as they are, or with `dequantize` of a
    model that was never quantised. Raises `LoadError` for what is not supported.
    """
    method = quant_method(hf)
    _check_asked(args, method)
    if method is None:
        return dict(hf), tensors
    model_type = str(hf.get("model_type"))
    if METHODS.get(model_type) != method:
        known = ", ".join(f"{method!r} of {name}" for name, method in METHODS.items())
        raise LoadError(
            f"config field {FIELD!r}: weights of {model_type} in {method!r} are not supported; "
            f"supported: {known}"
        )
    if args.dequantize:
        plain = {name: value for name, value in hf.items() if name != FIELD}
        if tensors is None:
            return plain, None
        return plain, Mxfp4Source(tensors) if method == "mxfp4" else BlockScaledSource(tensors)
    if model_type not in STAY_PACKED:
        raise LoadError(
            f"config field {FIELD!r}: weights of {model_type} in {method!r} cannot stay packed; "
            "dequantize makes them arrays of dtype at load"
        )
    if tensors is not None and method == "fp8":
        tensors = PackedSource(tensors, has_exponents=has_exponents(hf))
    return dict(hf), tensors


def quant_method(hf: Mapping[str, Any]) -> str | None:
    method = (hf.get(FIELD) or {}).get("quant_method")
    return None if method is None else str(method)


def has_exponents(hf: Mapping[str, Any]) -> bool:
    """Whether scales are powers of two."""
    return (hf.get(FIELD) or {}).get("scale_fmt") == "ue8m0"


def _check_asked(args: ModelArgs, method: str | None) -> None:
    if args.quantization is None:
        return
    if QUANT_METHODS[args.quantization] != method:
        raise LoadError(
            f"quantization {args.quantization!r} is not what the checkpoint has "
            f"({method or 'no quantization'}); weights are not quantised at load"
        )
    if args.dequantize:
        raise LoadError(f"quantization {args.quantization!r} and dequantize exclude each other")
