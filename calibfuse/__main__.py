"""Run the command line as a module: `python -m calibfuse`, `accelerate launch -m calibfuse train-calibrator ...`."""

import sys

from calibfuse.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
