"""A Hugging Face decoder becomes one graph over a packed batch, or is refused in one line."""
