"""From a plan to run records: workers, leases, processes, tuning, provenance."""
