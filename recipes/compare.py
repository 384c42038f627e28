"""Compare arms (AdamW, SGD, any SAM method, averaged weights) on tasks, paired over seeds, and write a report.

    python recipes/compare.py configs/comparison/digits.yaml --plan      # print what would run
    python recipes/compare.py configs/comparison/digits.yaml             # run what is missing, then report

Repeat the command to resume.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("compare")
