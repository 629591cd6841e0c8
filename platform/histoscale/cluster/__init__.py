"""The shell around a run: jobs, the lease of a run folder, and the launch on Ray Train."""
