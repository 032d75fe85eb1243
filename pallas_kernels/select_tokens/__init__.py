from jengine.pallas_kernels.select_tokens.api import select_tokens

__all__ = ["select_tokens"]
