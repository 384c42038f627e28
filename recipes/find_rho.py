"""Find a rho for your model and data at the cost of one or two ordinary runs, or learn that SAM does not help there.

    python recipes/find_rho.py image_classification configs/image_classification/digits.yaml --label_noise 0.4

Give the recipe, its usual command line, and the options of the search, in any order. After an interruption, the same
command resumes. docs/find_rho.md describes the search, the rule for the recommendation, and its limits.
"""

from hf_sam.tasks.command_line.program import run_task

if __name__ == "__main__":
    run_task("find_rho")
