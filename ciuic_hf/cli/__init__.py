"""The ``ciuic`` command, one module for each subcommand."""
