"""A graph becomes a callable: weights packed, operators called directly, the rest left to Inductor."""
