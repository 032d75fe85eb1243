from jengine.pallas_kernels.latent_attention.api import latent_attention

__all__ = ["latent_attention"]
