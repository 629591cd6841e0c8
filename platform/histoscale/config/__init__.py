"""The recipe: what a run is, decoded strictly and fingerprinted."""
