"""From a plan to run records: the driver, executors, processes, tuning, provenance."""
