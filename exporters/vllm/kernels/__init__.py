"""What multiplies matrices in vLLM: our operator, packed integers, and what is known of vLLM's kernels."""
