from jengine.pallas_kernels.norm_and_rotate.api import norm_and_rotate

__all__ = ["norm_and_rotate"]
