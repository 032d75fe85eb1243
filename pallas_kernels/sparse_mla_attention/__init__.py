from jengine.pallas_kernels.sparse_mla_attention.api import sparse_mla_attention

__all__ = ["sparse_mla_attention"]
