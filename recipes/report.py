"""Report on fine-tuned checkpoints: metrics with intervals, calibration, disagreements, paired tests, robustness.

    python recipes/report.py outputs/digits_adamw outputs/digits_sam --output_dir outputs/report
    python recipes/report.py adamw=outputs/a sam=some/hub-id --dataset imdb --test_samples 1000

Checkpoints are local folders, hub ids or PEFT adapters, optionally named as name=checkpoint. By default, the data are
those in the first checkpoint's run record; `--dataset` and the other data arguments of the training recipes override
them. Writes a self-contained `report.html`, the same as `report.md`, and the numbers.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("report")
