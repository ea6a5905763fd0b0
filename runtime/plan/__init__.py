"""`llm42 plan`: a device in words, probed or known becomes checked features; a model's needs on it, what they
cost, and the sizes that an engine should have there."""
