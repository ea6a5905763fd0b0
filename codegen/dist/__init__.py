"""Collective operators through ``torch.distributed``: Gloo on CPUs, NCCL on GPUs."""
