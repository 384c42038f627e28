"""From words on a command line and keys of a YAML file to dataclasses, and mistakes in one line each."""
