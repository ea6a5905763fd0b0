"""What compiled kernels may spill: nothing, with the Triton that results are committed with, and newer."""

from __future__ import annotations


def allowed() -> int:
    """Bytes on NVIDIA, vector registers on AMD. Triton 3.6 gives its registers out less well."""
    import triton

    major, minor = (int(part) for part in triton.__version__.split(".")[:2])
    return 0 if (major, minor) >= (3, 7) else 16
