"""Tiles from slides to ranks: Ray Data reads the chapters of the plan, each rank gets its own, in order."""
