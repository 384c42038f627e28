"""Calibration of a classifier: binned accuracy against confidence, from saved predictions."""

from __future__ import annotations

import numpy as np
import pandas as pd

BINS = 15


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> pd.DataFrame:
    """
    Accuracy and mean confidence in confidence bins of equal width, `(low, high]` as in Guo et al. 2017.

    Returns:
        `pd.DataFrame`: One row per non-empty bin: `low`, `high`, `examples`, `confidence`, `accuracy`.
    """
    index = np.clip(np.ceil(np.nan_to_num(confidence) * bins).astype(int) - 1, 0, bins - 1)  # NaN: of a diverged model
    examples = np.bincount(index, minlength=bins)
    used = np.flatnonzero(examples)
    sums = (np.bincount(index, weights=values, minlength=bins)[used] for values in (confidence, correct))
    confidence_mean, accuracy = (total / examples[used] for total in sums)
    columns = {"low": used / bins, "high": (used + 1) / bins, "examples": examples[used]}
    return pd.DataFrame({**columns, "confidence": confidence_mean, "accuracy": accuracy})


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """Mean gap between accuracy and confidence over bins, weighted by their examples (Guo et al. 2017, Equation 3)."""
    table = reliability(confidence, correct, bins)
    return float(np.average((table.accuracy - table.confidence).abs(), weights=table.examples))
