"""Evaluation of a checkpoint: predictions, metrics, calibration, and corruption of its inputs and weights."""
