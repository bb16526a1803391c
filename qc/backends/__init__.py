"""Code generation and execution: the torch reference and TVM for CPUs."""
