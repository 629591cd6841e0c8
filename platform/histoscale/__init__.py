"""Elastic pretraining of pathology foundation models, straight from slides in object storage."""
