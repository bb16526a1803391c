"""Run a GPU artifact through the CUDA driver: ctypes and numpy alone, no compiler, no torch."""
