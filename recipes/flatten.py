"""Train a finished checkpoint with SAM for a short phase before quantization, merging or more fine-tuning.

    python recipes/flatten.py outputs/minilm                                  # data from its run record
    python recipes/flatten.py some/hub-id --dataset imdb --sam_rho 0.05       # any option of the training recipes
    python recipes/flatten.py outputs/lora --task causal-lm --output_dir outputs/lora-flat

The checkpoint is a local folder or a hub id with a trained head, or a PEFT adapter, whose factors are then trained. It
is trained on its own task. The defaults depend on its kind; `--learning_rate`, `--sam_rho` and all other options
override them. Run record and model card say that this was a flatten phase. `recipes/survival.py BEFORE AFTER` measures
whether it helped.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("flatten")
