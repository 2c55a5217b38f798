"""The command line: `main` and one module per command, each with `add_arguments(parser)` and `run(args) -> int`.

A command's module imports nothing heavy at its top (no torch, no transformers): it is loaded for `--help` too.
It may hold a string `EXAMPLES`, shown below its help.
"""
