"""Reports: documents, statistics, formatting, plots and their sections. Imports the rest of the package; nothing but report writers imports it."""
