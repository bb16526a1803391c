"""Passes that decide which nodes run together as one kernel."""
