from jengine.pallas_kernels.joint_attention.api import joint_attention

__all__ = ["joint_attention"]
