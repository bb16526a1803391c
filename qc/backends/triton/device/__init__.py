"""Device functions: all arithmetic of GPU kernels, hand-written; generated modules only call it."""
