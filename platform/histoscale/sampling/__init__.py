"""The plan of a run: which tile is sample k, and which rank computes it. Pure functions on numpy arrays."""
