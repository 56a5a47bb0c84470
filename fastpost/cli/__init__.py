"""The command line: one file per command, dispatched by `main`."""
