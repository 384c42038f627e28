"""Parse the command line and YAML files into dataclasses, and report each mistake in one line."""
