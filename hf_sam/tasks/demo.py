"""Compare AdamW and SAM on the embedded digits, with and without wrong labels, in a few minutes on a CPU.

    hf-sam demo --output_dir outputs/demo

The models are evaluated as trained, and with their weights rounded to 3 and 2 bits. Every run is
`hf-sam image-classification digits_resnet` with a few overrides; runs with the same seed share initial weights, data
order, subset and wrong labels.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from ..experiments.records import RECORD_NAME, read_record
from ..reporting.comparison import write_report
from .command_line.config_files import CONFIGS
from .command_line.help import command_again
from .command_line.parsers import parse_demo
from .tables import markdown

CONFIG = CONFIGS / "image_classification/digits_resnet.yaml"
SETTINGS = ["--train_samples", "640"]
# The second and third are the controls that any gain must beat: what fits wrong labels less, for half the compute.
ARMS = {
    "AdamW": ["--sam_rho", "0"],
    "AdamW, lr / 6": ["--sam_rho", "0", "--learning_rate", "5e-4"],
    "AdamW, micro-batches of 4": [
        *("--sam_rho", "0"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8"),
    ],
    "SAM, rho 0.2": ["--sam_rho", "0.2"],
}
NOISE = [0.0, 0.4]
BITS = [3, 2]  # the trained models are also evaluated with their weights rounded, `hf-sam survival`
FIRST = next(iter(ARMS))


@dataclass(frozen=True)
class Run:
    """One cell of the table: its position, and its command line."""

    noise: float
    arm: str
    seed: int
    max_steps: int | None = None

    @property
    def name(self) -> str:
        return f"noise{self.noise:g}_{re.sub(r'[^a-z0-9.]+', '_', self.arm.lower())}_seed{self.seed}"

    def argv(self, folder: Path) -> list[str]:
        seeds = [word for key in ("seed", "subset_seed", "noise_seed") for word in (f"--{key}", str(self.seed))]
        noise = ["--label_noise", str(self.noise)]
        quiet = ["--disable_tqdm", "true", "--use_cpu", "true", "--overwrite_output_dir", "true"]
        names = ["--task", "digits", "--arm", self.arm]
        short = [] if self.max_steps is None else ["--max_steps", str(self.max_steps)]
        words = [*SETTINGS, *ARMS[self.arm], *seeds, *noise, *names, *quiet, *short]
        return [str(CONFIG), "--output_dir", str(folder / self.name), *words]


def train(run: Run, folder: Path) -> dict:
    """Run one cell in its own process; its output goes to `log.txt` next to its results."""
    import torch

    torch.set_num_threads(1)
    from . import image_classification, survival

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            image_classification.main(run.argv(folder))
            survived = survival.main(survival_argv(folder / run.name))
    finally:
        (folder / run.name).mkdir(parents=True, exist_ok=True)
        (folder / run.name / "log.txt").write_text(printed.getvalue(), encoding="utf-8")
    results = json.loads((folder / run.name / "all_results.json").read_text(encoding="utf-8"))
    kept = ("test_accuracy", "test_f1_macro", "test_nll", "test_ece", "train_runtime", "sam_passes", "sam_cost")
    rounded = {f"accuracy_{row['level']}_bits": row["value"] for row in survived["scores"] if row["level"] in BITS}
    return asdict(run) | {key: results.get(key) for key in kept} | rounded


def survival_argv(folder: Path) -> list[str]:
    """Return the command line that evaluates a run with its weights rounded, and adds the scores to its record."""
    bits = ["--bits", *map(str, BITS), "--group_sizes", "0"]
    where = ["--output_dir", str(folder / "survival"), "--disable_tqdm", "true"]
    return [str(folder), "--treatments", "quantize", *bits, *where]


def table(runs: pd.DataFrame) -> pd.DataFrame:
    """Compute mean and standard deviation over seeds of test accuracy in %, and of the paired difference from AdamW."""
    rows = []
    for (noise, arm), group in runs.groupby(["noise", "arm"], sort=False):
        accuracy = 100 * group.set_index("seed")["test_accuracy"]
        first = 100 * runs[(runs.noise == noise) & (runs.arm == FIRST)].set_index("seed")["test_accuracy"]
        rows.append(
            {
                "wrong labels": f"{100 * noise:.0f} %",
                "optimizer": arm,
                "accuracy": f"{accuracy.mean():.1f}{_spread(accuracy)}",
                f"minus {FIRST}": "" if arm == FIRST else f"{(d := accuracy - first).mean():+.1f}{_spread(d)}",
                "ECE": f"{group.test_ece.mean():.3f}",
                **{f"at {bits} bits": f"{100 * group[f'accuracy_{bits}_bits'].mean():.1f}" for bits in BITS},
                "seconds": f"{group.train_runtime.mean():.0f}",
            }
        )
    return pd.DataFrame(rows)


def _spread(values: pd.Series) -> str:
    """Format the standard deviation, if there are several values."""
    return f" ± {values.std():.1f}" if len(values) > 1 else ""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_demo(argv)
    start = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = [Run(noise, arm, seed, args.max_steps) for noise in NOISE for seed in range(args.seeds) for arm in ARMS]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(train, run, args.output_dir) for run in runs]
        try:
            results = [job.result() for job in tqdm(as_completed(jobs), total=len(jobs), desc="training runs")]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # otherwise all other runs would be made first
            raise
    frame = pd.DataFrame(results)
    frame["arm"] = pd.Categorical(frame["arm"], list(ARMS))
    frame = frame.sort_values(["noise", "arm", "seed"]).astype({"arm": str}).reset_index(drop=True)
    summary = table(frame)

    frame.to_csv(args.output_dir / "runs.csv", index=False)
    (args.output_dir / "summary.json").write_text(summary.to_json(orient="records", indent=1), encoding="utf-8")
    (args.output_dir / "table.md").write_text(markdown(summary) + "\n", encoding="utf-8")
    print(
        f"\nTest accuracy in %, mean ± standard deviation, seeds: {args.seeds}. 450 test images: one image is 0.2 points."
        f"\n\n{markdown(summary)}\n\n"
        f"{len(runs)} runs in {time.perf_counter() - start:.0f} s. All runs took the same number of steps, with two "
        f"passes per step for SAM;\nthe learning rate is that of {CONFIG.name} except where the table says otherwise.\n"
        f"Written: {args.output_dir}/table.md, summary.json, runs.csv, and a folder for each run."
    )
    report = write_report(
        [read_record(args.output_dir / run.name / RECORD_NAME) for run in runs],  # an earlier call may have left others
        args.output_dir / "report",
        title="Sharpness-aware minimization on digits",
        command=command_again("demo", sys.argv[1:] if argv is None else argv),
        control=FIRST,
        treatment="SAM, rho 0.2",
        arms=list(ARMS),
    )
    print(f"Report: {report}")
