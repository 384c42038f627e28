"""Measure the sharpness of the loss around fine-tuned checkpoints.

    accelerate launch recipes/sharpness.py --checkpoints adamw=outputs/digits_adamw sam=outputs/digits_sam

By default, the data are those in the first checkpoint's run record; `--dataset` and the other data arguments of the
training recipes override them. Writes `sharpness.json`, `report.html`, `report.md`, figures and their numbers to
`--output_dir`. Under `accelerate launch`, the processes split the examples, and the results are the same.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("sharpness")
