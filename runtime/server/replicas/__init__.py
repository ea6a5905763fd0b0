"""Several engines of one contract behind one door: who dies takes no answer along."""
