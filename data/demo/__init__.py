"""What the two demos need: small models, prompts and preferences made from packages that anyone can install."""
