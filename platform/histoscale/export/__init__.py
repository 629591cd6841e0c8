"""A run's backbone in the layout that others load."""
