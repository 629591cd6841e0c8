"""Checkpoints that any world size and any ZeRO stage can resume: fragments, a manifest, a commit marker."""
