"""What `python -m lora_kernels` does: a module for each command.

Each has `add(subparsers)`, which returns the parser of its options, and `run(args)`, which returns
the exit status. An error that its user can cure is a ValueError, OSError or ImportError.
"""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]
