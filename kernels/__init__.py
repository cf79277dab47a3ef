"""Device code and launchers; imported as ``stn_triton.kernels``, never on its own.

Importing this package imports no triton: the modules that need it are imported at the first launch.
"""
