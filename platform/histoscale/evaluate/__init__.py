"""What an embedding is worth: probes on labelled tiles, beside baselines that it must beat."""
