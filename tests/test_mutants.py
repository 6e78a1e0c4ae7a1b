"""The mutants of `make mutants` fit the sources; what kills them is run by hand."""

import os
import pathlib

import mutants
import pytest


@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_has_its_place(name):
    file, *change, tests = mutants.MUTANTS[name]
    changed = mutants.mutated(file, *change)
    assert changed != mutants.source_of(file).read_text()
    if file.endswith(".py"):
        compile(changed, file, "exec")
    for test in tests.split():
        path, _ = mutants.pytest_of(test)
        path, *inner = path.split("::")
        assert all(f"def {one}(" in pathlib.Path(path).read_text() for one in inner), test


def test_places_are_found_by_function(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "PACKAGE", tmp_path)
    code = "n = 1\n\n\n@f\ndef f():\n    n = 1\n\n\nclass C:\n    def f(self):\n        n = 1\n"
    (tmp_path / "m.py").write_text(code)
    changed = {
        where: mutants.mutated("m.py", where, "n = 1", "n = 2") for where in (None, "f", "C.f")
    }
    assert len(set(changed.values())) == 3
    for where, new in changed.items():
        line = [None, "f", "C.f"].index(where)
        found = [line.strip() for line in new.splitlines() if "n =" in line]
        assert found == ["n = 2" if i == line else "n = 1" for i in range(3)]
    for where, text in (("f", "n = 3"), ("g", "n = 1"), (None, "f")):
        with pytest.raises(SystemExit, match=r"m\.py"):
            mutants.mutated("m.py", where, text, "")


def test_survivors_are_told_from_the_killed(monkeypatch):
    monkeypatch.delitem(os.environ, "PYTEST_ADDOPTS", raising=False)
    test = "dropout::test_threshold_and_scale"
    where = ("backends/dropout.py", "threshold")
    assert mutants.killed_by((*where, "round(65536 * p)", "round(p * 65536)", test)) is None
    killer = mutants.killed_by((*where, "round(65536 * p)", "int(p)", test))
    assert killer.startswith("test_threshold_and_scale")
