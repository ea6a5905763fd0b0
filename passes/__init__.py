"""FX graph in, FX graph out. One pass a file; no pass knows another."""
