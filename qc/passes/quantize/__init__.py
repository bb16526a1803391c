"""Passes that choose the stored values of weights and the formats of activations."""
