"""Quality of a model: perplexity, exact answers, and the distance from the original model."""
