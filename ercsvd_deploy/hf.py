"""`import ercsvd_deploy.hf` registers the format with transformers, whose `from_pretrained` then reads it."""

from ercsvd_deploy.models.compressed.hf import ErcSvdConfig, ErcSvdQuantizer, register

__all__ = ["ErcSvdConfig", "ErcSvdQuantizer", "register"]
