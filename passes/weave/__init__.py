"""Token weaving: a graph is written for two halves of its tokens, and a plan says when each half runs."""
