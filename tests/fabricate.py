"""Records of runs that never were, with differences that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from hf_sam.experiments.records import RECORD_NAME, RunRecord

GAIN = {"adamw": 0.0, "sgd": -0.02, "sam": 0.01, "asam": 0.015, "looksam": 0.005}  # per unit of noise, times 4
PASSES = {"adamw": 1, "sgd": 1, "sam": 2, "asam": 2, "looksam": 1.2}


def fabricate(
    folder: Path,
    tasks=("digits",),
    conditions=("clean", "noise 0.4"),
    budgets=("steps", "passes"),
    arms=tuple(GAIN),
    seeds=range(5),
    entries=10,
    predictions=False,
) -> list[RunRecord]:
    """One finished record per combination, written under `folder`."""
    records = []
    for task in tasks:
        for condition in conditions:
            noise = 0.0 if condition == "clean" else float(condition.split()[1])
            for budget in budgets:
                for arm in arms:
                    for seed in seeds:
                        path = folder / task / condition.replace(" ", "-") / budget / arm / f"seed-{seed}" / RECORD_NAME
                        record = fabricate_run(path, task, condition, noise, budget, arm, seed, entries)
                        if predictions:
                            _keep_predictions(record)
                        record.write(path)
                        records.append(record)
    return records


def fabricate_run(path, task, condition, noise, budget, arm, seed, entries=10) -> RunRecord:
    shared = np.random.default_rng([seed, len(task)]).normal(0, 0.02)
    own = np.random.default_rng([seed, *map(ord, arm + budget + condition)]).normal(0, 0.004)
    accuracy = float(0.93 - 0.4 * noise + shared + GAIN.get(arm, 0) * (1 + 4 * noise) + own)
    factor = 2 / PASSES.get(arm, 1) if budget == "passes" else 1
    steps, passes = int(100 * factor), 100 * factor * PASSES.get(arm, 1)
    curve = [
        {
            "step": int(steps * (i + 1) / entries),
            "loss": 2.0 * 0.7**i,
            "eval_accuracy": accuracy * (1 - 0.5**i),
            "eval_loss": 1 - accuracy + 0.5**i,
        }
        for i in range(entries)
    ]
    sam = {"method": arm, "rho": 0.05, "p": 2.0} if "sam" in arm else None
    return RunRecord(
        task=task,
        arm=arm,
        condition=condition,
        budget=budget,
        seed=seed,
        status="finished",
        config={
            "recipe": {"dataset": task},
            "training_arguments": {"optim": "sgd" if arm == "sgd" else "adamw_torch", "learning_rate": 1e-3},
            "sam": sam,
        },
        model={
            "name": "tiny",
            "class": "ViTForImageClassification",
            "parameters": 101_234,
            "trainable_parameters": 101_234,
            "fingerprint": f"model-{seed}",
        },
        data={
            "train": {"examples": 500, "fingerprint": f"train-{task}-{condition}-{seed}"},
            "test": {"examples": 400, "fingerprint": f"eval-{task}"},
        },
        environment={
            "packages": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0"},
            "git": {"commit": "0" * 40, "dirty": False},
            "hardware": {"processors": 2, "accelerators": [], "processes": 1},
        },
        metrics={
            "accuracy": accuracy,
            "nll": 2 * (1 - accuracy),
            "ece": 0.05 + noise / 10,
            "brier": 1.5 * (1 - accuracy),
        },
        steps=steps,
        passes=passes,
        seconds=passes * 0.05,
        samples_per_second=32 * steps / (passes * 0.05),
        peak_memory=400 * 2**20,
        curves=curve,
        sharpness={"lambda_max": 30.0 - 10 * ("sam" in arm) + own * 500},
        started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T00:01:00+00:00",
        path=path,
    )


def _keep_predictions(record: RunRecord, examples: int = 200, classes: int = 4) -> None:
    rng = np.random.default_rng(record.seed)
    labels = np.random.default_rng(0).integers(classes, size=examples)  # one test split for all seeds
    right = rng.random(examples) < record.metrics["accuracy"]
    predicted = np.where(right, labels, (labels + 1) % classes)
    top = rng.uniform(0.5, 0.99, size=examples)
    probabilities = np.full((examples, classes), 1.0) * ((1 - top) / (classes - 1))[:, None]
    probabilities[np.arange(examples), predicted] = top
    record.path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"label": labels, "probabilities": list(probabilities)})
    table.to_parquet(record.path.parent / "predictions.parquet")
    record.predictions = "predictions.parquet"
