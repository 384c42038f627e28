"""Fine-tune a token classifier with sharpness-aware minimization: named entities or parts of speech.

    accelerate launch recipes/token_classification.py configs/token_classification/conll2003.yaml --sam_rho 0.01

`--sam_rho 0` is the baseline with the same script and configuration.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("token_classification")
