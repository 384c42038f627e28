"""Fine-tune a causal language model, fully or with LoRA, with sharpness-aware minimization.

    accelerate launch recipes/causal_lm.py configs/causal_lm/smollm2_lora.yaml --sam_rho 0.05

Texts, prompts with completions, and conversations are trained with TRL's `SFTTrainer` (packing, completion-only loss,
chat templates). `--trainer plain` uses transformers' Trainer, for texts. `--sam_rho 0` is the baseline.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("causal_lm")
