"""Compare arms (AdamW, SGD, any SAM method, averaged weights) on tasks, paired over seeds, and write the report.

    python recipes/compare.py configs/comparison/digits.yaml --plan      # what would run
    python recipes/compare.py configs/comparison/digits.yaml             # run what is missing, then report

The same command again goes on where it stopped; the same command elsewhere on a shared folder helps.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("compare")
