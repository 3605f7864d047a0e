"""The quantize stage: how every matrix is stored, and GPTQ layer by layer."""
