"""Exact changes of what linears read, in front of quantization."""
