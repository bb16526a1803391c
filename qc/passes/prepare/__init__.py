"""Passes that bring a captured graph into the form that all others expect."""
