"""How sharp the loss is around fine-tuned checkpoints, on data given as in the other recipes.

    accelerate launch recipes/sharpness.py --checkpoints adamw=outputs/digits_adamw sam=outputs/digits_sam

The data are those that the first checkpoint's run record names; `--dataset` and the other data arguments of the
training recipes come first. Writes `sharpness.json`, `report.html`, `report.md`, figures and their numbers to
`--output_dir`. Under `accelerate launch` processes share the examples, and the numbers stay the same.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("sharpness")
