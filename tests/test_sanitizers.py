"""The short form of `make sanitize`: the kernels under AddressSanitizer and UBSan, odd shapes and
strides, and arguments that must be refused before memory is touched."""

import pytest
import sanitize

TESTS = ("any_layout", "no_rows", "each_argument", "what_lies_beside", "wrong_arguments", "masters")


@pytest.mark.skipif(sanitize.compiler() is None, reason="no C++ compiler here")
def test_short_check_passes(tmp_path):
    sanitize.build(tmp_path, "-O0")
    (library,) = (tmp_path / "lora_kernels").glob("*.so")
    code = library.read_bytes()
    assert b"__asan_report_store" in code
    assert b"__ubsan_handle" in code
    where = "import lora_kernels, sys; sys.exit(not lora_kernels.__file__.startswith(sys.argv[1]))"
    assert sanitize.python(tmp_path, "-c", where, str(tmp_path)).returncode == 0
    selected = ["-k", " or ".join(TESTS), "test_native.py", "test_native_safety.py"]
    run = sanitize.run_tests(tmp_path, selected)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "skipped" not in run.stdout
