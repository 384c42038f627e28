"""Run records, paired statistics, plots and the report of a comparison."""
