"""The short form of `make sanitize`: the kernels under AddressSanitizer and UBSan, odd shapes and
strides, and arguments that must be refused before memory is touched; and how the reports of
compute-sanitizer are read."""

import pytest
import racecheck
import sanitize

TESTS = (
    "any_layout",
    "no_rows",
    "each_argument",
    "what_lies_beside",
    "wrong_arguments",
    "masters",
    "past_the_last",
)


@pytest.mark.skipif(sanitize.compiler() is None, reason="no C++ compiler here")
def test_short_check_passes(tmp_path):
    sanitize.build(tmp_path, "-O0")
    (library,) = (tmp_path / "lora_kernels").glob("*.so")
    code = library.read_bytes()
    assert b"__asan_report_store" in code
    assert b"__ubsan_handle" in code
    where = "import lora_kernels, sys; sys.exit(not lora_kernels.__file__.startswith(sys.argv[1]))"
    assert sanitize.python(tmp_path, "-c", where, str(tmp_path)).returncode == 0
    selected = ["-k", " or ".join(TESTS), *sanitize.FILES]
    run = sanitize.run_tests(tmp_path, selected)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "skipped" not in run.stdout


def report(*places: str) -> str:
    """As racecheck writes it: of each hazard its places, joined by commas."""
    lines = ["========= COMPUTE-SANITIZER"]
    for hazard in places:
        read, *writes = hazard.split(",")
        lines.append(f"========= Error: Race reported between Read access at k+0xe0 in {read}")
        lines += [f"=========     and Write access at k+0x9 in {at} [29 hazards]" for at in writes]
        lines += ["========= "]
    count = len(places)
    lines.append(
        f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)"
    )
    return "\n".join(lines)


def test_races_are_told_from_triton_s_dispatch():
    first, call = racecheck.dispatch()
    known = f"{first},{first},{call}"
    assert racecheck.hazards(report(known, known)) == []
    for other in (
        f"{first},{first},specialised.py:1",
        f"specialised.py:1,{first}",
        "a.py:1,a.py:2",
    ):
        (found,) = racecheck.hazards(report(known, other, known))
        assert all(place in found for place in other.split(","))
    assert racecheck.hazards(report()) == []


def test_half_a_report_of_races_is_refused():
    whole = report("a.py:1,a.py:2")
    for half in ("", whole[: whole.index("RACECHECK")], whole.replace("SUMMARY: 1", "SUMMARY: 2")):
        with pytest.raises(ValueError, match="hazards in a report"):
            racecheck.hazards(half)
