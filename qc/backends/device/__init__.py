"""Packages for devices: a library, its weights and a runner, without Python or a compiler there."""
