"""Compare AdamW, SAM and ASAM on the embedded digits, with and without wrong labels, in a few minutes on a CPU.

    python recipes/demo.py --output_dir outputs/demo

Every run is `recipes/image_classification.py configs/image_classification/digits.yaml` with a few overrides. Runs with
the same seed share initial weights, data order, subset and wrong labels.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("demo")
