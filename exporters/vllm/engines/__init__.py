"""vLLM engines in processes of their own: what they need of a machine, what they answer, how they fail."""
