"""Fine-tune an image classifier, or train one from scratch, with sharpness-aware minimization.

    accelerate launch recipes/image_classification.py configs/image_classification/digits_sam.yaml --sam_rho 0.1

`--sam_rho 0` is the baseline with the same script and configuration.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("image_classification")
