"""Sweeps: many runs that answer one question, such as which model, how much data, or how small."""
