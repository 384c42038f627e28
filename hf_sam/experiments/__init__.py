"""Studies, from a plan to run records: driver, executors, processes, tuning, provenance."""
