from jengine.pallas_kernels.mla_attention.api import mla_attention

__all__ = ["mla_attention"]
