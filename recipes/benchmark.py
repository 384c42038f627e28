"""What a step of each SAM method costs on your model and batch, beside the stock Trainer's in the same run.

    accelerate launch recipes/benchmark.py --task image-classification --model_name_or_path facebook/dinov2-small \
        --dataset digits --image_size 70 --batch_sizes 4 16 --methods sam asam subset late
    python recipes/benchmark.py --task text-classification --synthetic true --sizes 2M 22M 135M --methods sam

All contenders take turns in one process, a few steps each, so that a machine that slows down slows all alike. Writes
`benchmark.json`, `benchmark.csv`, `benchmark.md` and drawings to `--output_dir`.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("benchmark")
