"""Emitters of Triton kernels: a specialisation in, readable source text out. Importing needs no Triton."""
