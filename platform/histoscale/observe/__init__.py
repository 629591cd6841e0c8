"""What a person sees of a run: its metrics on TensorBoard and in a file."""
