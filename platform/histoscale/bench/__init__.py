"""Named benchmarks: `python -m histoscale.bench NAME` prints one JSON line per figure and nothing else."""
