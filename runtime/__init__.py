"""Requests, scheduler, paged KV, packed batches, sampler, verifier and certificates."""
