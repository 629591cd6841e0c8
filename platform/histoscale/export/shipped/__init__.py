"""Files that every export holds as they stand: they need torch, safetensors and Pillow, and nothing of histoscale."""
