"""What this machine has, which backend is used, a self-check."""

import argparse
from typing import TYPE_CHECKING

from lora_kernels import doctor

if TYPE_CHECKING:
    from lora_kernels.commands import Subparsers


def add(subparsers: "Subparsers") -> argparse.ArgumentParser:
    return subparsers.add_parser(
        "doctor", help="what this machine has, which backend is used, a self-check"
    )


def run(args: argparse.Namespace) -> int:
    return doctor.main()
