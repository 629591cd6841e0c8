"""Whole-slide images: exact reads, tissue masks and the slide index."""
