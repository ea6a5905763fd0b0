"""Ground floor: the operators of llm42 and how each target computes them."""
