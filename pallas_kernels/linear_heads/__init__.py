from jengine.pallas_kernels.linear_heads.api import linear_heads

__all__ = ["linear_heads"]
