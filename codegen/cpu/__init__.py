"""C++ kernels of the operators, compiled once on the user's machine and cached."""
