"""Training: schedules, the step, the DeepSpeed engine, the EMA teacher. Knows nothing of Ray."""
