"""Trainer callbacks that average weights or add noise to the updates: what SAM is compared with."""
