"""What config.json says of packed weights, and what becomes of them: they stay as they are on the
device, or are read as floats.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jengine.config import QUANT_METHODS, ModelArgs
from jengine.errors import LoadError
from jengine.loading.block_scales import BlockScaledSource, PackedSource
from jengine.loading.mxfp4 import Mxfp4Source
from jengine.pallas_kernels.packed import FP8_BLOCKS, FP8_FLOAT_BLOCKS, Packing

if TYPE_CHECKING:
    from jengine.loading.checkpoint import TensorSource

FIELD = "quantization_config"
METHODS = {"deepseek_v4": "fp8", "gpt_oss": "mxfp4"}  # by `model_type`


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
    if tensors is not None and method == "fp8":
        has_exponents = fp8_packing(hf).scale_dtype == "uint8"
        tensors = PackedSource(tensors, has_exponents=has_exponents)
    return dict(hf), tensors


def quant_method(hf: Mapping[str, Any]) -> str | None:
    method = (hf.get(FIELD) or {}).get("quant_method")
    return None if method is None else str(method)


def fp8_packing(hf: Mapping[str, Any]) -> Packing:
    """Of weights in FP8, in blocks of 128 x 128."""
    has_exponents = (hf.get(FIELD) or {}).get("scale_fmt") == "ue8m0"
    return FP8_BLOCKS if has_exponents else FP8_FLOAT_BLOCKS


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
