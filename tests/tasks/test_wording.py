"""What reports and figures say is about what was done, in numbers as people write them."""

from __future__ import annotations

import dataclasses

import pandas as pd
import pytest

from hf_sam.reporting.benchmark import draw_sweep
from hf_sam.reporting.sharpness import _setup
from hf_sam.sharpness.profile import SharpnessConfig


@pytest.mark.parametrize(
    ("measures", "said", "not_said"),
    [
        (["sam"], [], ["worst case", "m-sharpness", "average case", "eigenvalues", "±"]),
        (["m"], ["m-sharpness: radius 0.05"], ["worst case", "projected ascent", "average case"]),
        (["worst", "average"], ["worst case: radius", "projected ascent", "average case: 8"], ["m-sharpness", "eigen"]),
    ],
)
def test_a_sharpness_report_describes_the_measures_that_were_taken(measures, said, not_said):
    entry = {"fingerprint": "f", "parameters": 3, "scalars": {}, "measures": {key: {} for key in measures}}
    record = {
        "config": dataclasses.asdict(SharpnessConfig(measures=measures)),
        "subset": {"labels": 8, "examples": 8, "split": "train", "fingerprint": "f", "dataset": "digits"},
        "perturb": "all",
        "dtype": "float32",
        "checkpoints": {"a": entry},
    }
    text = " ".join(next(iter(_setup(record))).items).lower()
    assert all(words in text for words in said)
    assert not any(words in text for words in not_said)


def test_the_ticks_of_a_sweep_are_its_settings():
    rows = pd.DataFrame(
        [
            {"variant": "sam", "parameters": p, "batch_size": b, "accumulation": 1, "processes": 1, "ratio": 2.0}
            for p in (2_000_000, 22_000_000)
            for b in (4, 16)
        ]
    )
    canvas = draw_sweep(rows)
    ticks = [[label.get_text() for label in axes.get_xticklabels()] for axes in canvas.axes]
    assert ticks == [["2M", "22M"], ["4", "16"]]
