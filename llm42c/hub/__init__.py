"""Where a model comes from: a folder, a hub id, or the alias of the one that a package carries."""
