"""The command line: python -m lora_kernels COMMAND, or lora-kernels COMMAND."""

import argparse
import sys

from lora_kernels.commands import convert, doctor, evaluate, finetune, inspect, merge, tune

COMMANDS = (doctor, tune, finetune, evaluate, merge, convert, inspect)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_kernels")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(subparsers).set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
