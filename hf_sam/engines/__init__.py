"""Where a step runs: one process, DDP, sharded engines; and what each of them cannot do."""
