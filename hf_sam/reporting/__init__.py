"""
Reports: documents, statistics, formatting, plots and their sections.

Imports the rest of the package; only the modules that write reports import it.
"""
