"""Measure what a step of each SAM method costs on your model and batch, relative to the stock Trainer in the same run.

    accelerate launch recipes/benchmark.py --task image-classification --model_name_or_path facebook/dinov2-small \
        --dataset digits --image_size 70 --batch_sizes 4 16 --methods sam asam subset late
    python recipes/benchmark.py --task text-classification --synthetic true --sizes 2M 22M 135M --methods sam

All variants take turns in one process, a few steps each, so that fluctuations of the machine affect all of them alike.
Writes `benchmark.json`, `benchmark.csv`, `benchmark.md` and plots to `--output_dir`.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("benchmark")
