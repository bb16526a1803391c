"""GPU kernels through Triton. Importing this package loads no Triton: its modules do."""
