"""What can be asked of a compiled model: what was rewritten, why not more, and what depends on the batch."""
