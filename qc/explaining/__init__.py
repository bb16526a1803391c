"""Explaining what quantization lost, layer by layer and pass by pass."""
