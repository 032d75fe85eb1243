from jengine.pallas_kernels.gated_delta.api import gated_delta, short_conv

__all__ = ["gated_delta", "short_conv"]
