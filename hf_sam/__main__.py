"""`python -m hf_sam` is `hf-sam`: what `accelerate launch` starts."""

from .tasks.command_line.subcommands import main

if __name__ == "__main__":
    main()
