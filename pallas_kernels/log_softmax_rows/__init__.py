from jengine.pallas_kernels.log_softmax_rows.api import log_softmax_rows

__all__ = ["log_softmax_rows"]
