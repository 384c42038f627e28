"""Fine-tune a text classifier with sharpness-aware minimization: one label, several, or a number per text or pair.

    accelerate launch recipes/text_classification.py configs/text_classification/glue_mrpc.yaml --sam_method asam

`--sam_rho 0` is the baseline with the same script and configuration.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("text_classification")
