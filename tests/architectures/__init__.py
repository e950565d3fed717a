"""Every decoder family that transformers has a causal LM for: the toolkit's paths against plain forwards."""
