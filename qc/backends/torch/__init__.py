"""The reference backend: evaluates the quantized graph in torch. Runs everything, slowly."""
