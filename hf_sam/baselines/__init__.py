"""Baselines for SAM, as Trainer callbacks: weight averaging and Entropy-SGD."""
