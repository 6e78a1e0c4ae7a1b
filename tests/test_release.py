"""`make release`, on a repository of the files that it changes."""

import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = (".ci/release.py", "lora_kernels/_version.py", "CITATION.cff", "CHANGELOG.md")
AUTHOR = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "someone"), ("EMAIL", "someone@example.org"))
}
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def run(folder, *command):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    return subprocess.run(
        command, cwd=folder, env=kept | AUTHOR, capture_output=True, text=True, timeout=60
    )


def release(folder, *words):
    return run(folder, sys.executable, ".ci/release.py", *words)


@pytest.fixture
def clone(tmp_path):
    for name in FILES:
        tmp_path.joinpath(name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(
        "# Changelog\n\n## 0.2.0 (unreleased)\n\n- New.\n\n## 0.1.0 (2020-01-02)\n"
    )
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "all"), ("tag", "v0.1.0")):
        assert run(tmp_path, "git", *words).returncode == 0
    return tmp_path


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(clone):
    done = release(clone, "0.2.0")
    assert done.returncode == 0, done.stderr
    today = date.today().isoformat()
    assert f"+## 0.2.0 ({today})" in done.stdout
    assert '+version: "0.2.0"' in done.stdout
    assert '+__version__ = "0.2.0"' in done.stdout
    assert "make lint test" in done.stdout
    assert not run(clone, "git", "status", "--porcelain").stdout
    assert run(clone, "git", "tag").stdout.split() == ["v0.1.0"]


def test_it_commits_and_tags(clone):
    assert release(clone, "0.2.0", "--yes").returncode == 0
    assert run(clone, "git", "describe", "--exact-match").stdout.strip() == "v0.2.0"
    assert not run(clone, "git", "status", "--porcelain").stdout
    assert '"0.2.0"' in (clone / "lora_kernels/_version.py").read_text()
    citation = (clone / "CITATION.cff").read_text()
    assert re.findall(r'^version: "(.*)"$', citation, re.MULTILINE) == ["0.2.0"]
    assert "unreleased" not in (clone / "CHANGELOG.md").read_text()
    again = release(clone, "0.3.0", "--yes")
    assert again.returncode != 0
    assert "unreleased" in again.stderr


@pytest.mark.parametrize(
    ("version", "words"),
    [("0.1.0", "more than the last tag's, 0.1.0"), ("0.2", "three numbers"), ("v0.2.0", "three")],
)
def test_versions_that_are_refused(clone, version, words):
    done = release(clone, version, "--yes")
    assert done.returncode != 0
    assert words in done.stderr


def test_a_tree_that_is_not_clean_is_refused(clone):
    (clone / "CITATION.cff").write_text("")
    done = release(clone, "0.2.0", "--yes")
    assert done.returncode != 0
    assert "not clean" in done.stderr
    assert "CITATION.cff" in done.stderr


def test_this_repository_s_files_have_what_a_release_changes(clone):
    shutil.copy(ROOT / "CHANGELOG.md", clone / "CHANGELOG.md")
    run(clone, "git", "commit", "-qam", "ours")
    if "(unreleased)" in (clone / "CHANGELOG.md").read_text():
        assert release(clone, "0.2.0").returncode == 0
