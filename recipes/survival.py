"""Evaluate fine-tuned checkpoints after quantization, pruning, weight noise and merging.

    python recipes/survival.py adamw=outputs/digits_adamw sam=outputs/digits_sam --output_dir outputs/survival
    python recipes/survival.py outputs/seed_0 --merge_with outputs/seed_1 --merge_start some/hub-id

Checkpoints are local folders, hub ids or PEFT adapters, optionally named as name=checkpoint. By default, the data are
those in the first checkpoint's run record; `--dataset` and the other data arguments override them. Nothing is trained.
Writes `survival.json`, `report.html`, `report.md`, figures and their numbers. `recipes/report.py --survival true`
includes the same results as a section.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("survival")
