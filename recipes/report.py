"""Report on fine-tuned checkpoints: metrics with intervals, calibration, disagreements, paired tests, robustness.

    python recipes/report.py outputs/digits_adamw outputs/digits_sam --output_dir outputs/report
    python recipes/report.py adamw=outputs/a sam=some/hub-id --dataset imdb --test_samples 1000

Checkpoints are local folders, hub ids or PEFT adapters, each alone or as name=checkpoint. The data are those that the
first checkpoint's run record names, unless `--dataset` and the other data arguments of the training recipes are given.
Writes one self-contained `report.html`, the same as `report.md`, and its numbers.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("report")
