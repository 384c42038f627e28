"""How good a checkpoint is: predictions, metrics, calibration, corruption of its inputs and weights."""
