"""What is left of fine-tuned checkpoints after quantization, pruning, noise and merging, on data given as in the other recipes.

    python recipes/survival.py adamw=outputs/digits_adamw sam=outputs/digits_sam --output_dir outputs/survival
    python recipes/survival.py outputs/seed_0 --merge_with outputs/seed_1 --merge_start some/hub-id

Checkpoints are local folders, hub ids or PEFT adapters, each alone or as name=checkpoint. The data are those that the first
checkpoint's run record names, unless `--dataset` and the other data arguments are given. Nothing is trained. Writes
`survival.json`, `report.html`, `report.md`, figures and their numbers; `recipes/report.py --survival true` has the same as a section.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("survival")
