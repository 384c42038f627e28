"""What the recipes share: arguments, data, metrics, and what happens before and after training."""

from .early import check_program

check_program()  # before anything else is imported: a mistyped word is told at once, not after torch has loaded
