"""Several processes run one model: what they tell each other, and how its weights are divided among them."""
