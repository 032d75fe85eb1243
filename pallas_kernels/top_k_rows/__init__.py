from jengine.pallas_kernels.top_k_rows.api import top_k_rows

__all__ = ["top_k_rows"]
