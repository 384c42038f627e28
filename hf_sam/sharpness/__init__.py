"""Measures of how flat the loss is around a trained checkpoint."""
