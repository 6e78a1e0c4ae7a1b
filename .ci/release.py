"""A release: version, citation, changelog, tag. `make release VERSION=x.y.z` says what it would do,
with ARGS=--yes it does it; nothing is pushed.

Asked for first: a clean tree, a version above the last tag's, a changelog whose first heading is
"(unreleased)" and has entries. What must have passed on this commit it names, and does not run.
"""

import argparse
import difflib
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = re.compile(r"(\d+)\.(\d+)\.(\d+)")
BEFORE = "make lint test test-integrations docs hub dist"


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def numbers(version: str) -> tuple[int, ...]:
    match = NUMBERS.fullmatch(version)
    if match is None:
        raise SystemExit(f"VERSION: got {version!r}, expected three numbers like 0.1.0")
    return tuple(map(int, match.groups()))


def check(version: str) -> None:
    """Of the repository as it lies; SystemExit with what is in the way."""
    asked = numbers(version)
    if changed := git("status", "--porcelain"):
        raise SystemExit(f"the tree is not clean, commit or remove first:\n{changed}")
    tags = [tag[1:] for tag in git("tag", "--list", "v*").split() if NUMBERS.fullmatch(tag[1:])]
    last = max(tags, key=numbers, default=None)
    if last is not None and asked <= numbers(last):
        raise SystemExit(f"VERSION: got {version}, expected more than the last tag's, {last}")


def replaced(text: str, pattern: str, new: str, what: str) -> str:
    found, count = re.subn(pattern, lambda match: new, text, count=1, flags=re.MULTILINE)
    if not count:
        raise SystemExit(what)
    return found


def changes(version: str, day: str) -> dict[str, str]:
    """The files of a release as they are after it, by name."""
    texts = {
        name: ROOT.joinpath(name).read_text()
        for name in ("lora_kernels/_version.py", "CITATION.cff", "CHANGELOG.md")
    }
    module, citation, changelog = texts
    texts[module] = replaced(
        texts[module], r'^__version__ = ".*"$', f'__version__ = "{version}"',
        f"{module}: no line __version__ = ...",
    )  # fmt: skip
    lines = re.sub(r"^(version|date-released):.*\n", "", texts[citation], flags=re.MULTILINE)
    texts[citation] = replaced(
        lines, r"^type: software$", f'type: software\nversion: "{version}"\ndate-released: {day}',
        f"{citation}: no line type: software",
    )  # fmt: skip
    entries = re.search(r"^## \S+ \(unreleased\)\n+(- |### )", texts[changelog], re.MULTILINE)
    first = re.search(r"^## .*", texts[changelog], re.MULTILINE)
    if entries is None or first is None or entries.start() != first.start():
        raise SystemExit(
            f"{changelog}: its first heading must be '## x.y.z (unreleased)' with entries below,"
            f" got {first.group() if first else 'none'!r}"
        )
    texts[changelog] = replaced(
        texts[changelog], r"^## \S+ \(unreleased\)$", f"## {version} ({day})", ""
    )
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version")
    parser.add_argument("--yes", action="store_true", help="write, commit and tag")
    args = parser.parse_args()
    check(args.version)
    after = changes(args.version, date.today().isoformat())
    for name, text in after.items():
        before = ROOT.joinpath(name).read_text()
        lines = (text.splitlines(keepends=True) for text in (before, text))
        sys.stdout.writelines(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}", n=0))
    tag = f"v{args.version}"
    print(f"must have passed on {git('rev-parse', '--short', 'HEAD')}: {BEFORE}")
    if not args.yes:
        print(f"nothing is written; ARGS=--yes commits this and tags it {tag}")
        return
    for name, text in after.items():
        ROOT.joinpath(name).write_text(text)
    git("add", *after)
    # A release of the version that the files have already still changes the changelog's heading.
    git("commit", "--message", f"Release {args.version}")
    git("tag", "--annotate", tag, "--message", f"lora_kernels {args.version}")
    print(f"committed and tagged; git push origin HEAD {tag} publishes it")


if __name__ == "__main__":
    main()
