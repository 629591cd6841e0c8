"""Embeddings of whole slides: tiles on a grid of tissue, one file per slide, and what can be learnt from them."""
