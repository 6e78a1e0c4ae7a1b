"""python -m lora_kernels doctor"""

import argparse
import sys

from lora_kernels import doctor


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="what this machine has, which backend is used, a self-check")
    parser.parse_args()
    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
