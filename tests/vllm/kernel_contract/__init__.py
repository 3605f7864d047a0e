"""vLLM's mixed-precision kernels without a GPU: their Python runs, their compiled operators are replaced.

Tests ask a child process (`child`) in which vLLM believes in a CUDA accelerator. Every operator that a
kernel calls is replaced by one that checks shapes, dtypes and layout as the compiled one does, undoes the
kernel's own permutations and multiplies naively. A tensor in a wrong layout thus ends in wrong numbers.
"""
