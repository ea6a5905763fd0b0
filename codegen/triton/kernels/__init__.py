"""GPU kernels as ordinary Triton functions, specialised by the constants above them.

No module imports these files: a launcher beside this folder asks ``fold`` for the text of a specialisation,
which is what is compiled. The constants' values are one specialisation, so a file also runs as it stands.
"""
