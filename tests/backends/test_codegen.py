"""The short form of the code generation check; the full one is
`python -m lora_kernels.backends.codegen`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from interpreted import AMPERE, HOPPER

from lora_kernels.backends import codegen
from lora_kernels.backends.codegen import __main__ as pages
from lora_kernels.backends.codegen import cases
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import CARDS, assume
from lora_kernels.backends.triton import launch, tiles

ROOT = Path(__file__).parents[2]


def triton_release() -> tuple[int, ...]:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def _environment():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "LORA_KERNELS_BACKEND", "LORA_KERNELS_PLAN"):
        environment.pop(name, None)
    return environment


def test_short_check_passes():
    """In a process of its own: it takes over Triton's driver."""
    command = [sys.executable, "-m", "lora_kernels.backends.codegen", "--short"]
    run = subprocess.run(command, env=_environment(), cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    kernels = {"gemm_tma_kernel", "dx_da_kernel", "coded_kernel", "specialised_gemm_kernel"}
    assert kernels <= set(run.stdout.split())
    assert "0 break a rule" in run.stdout


SOUND = codegen.Kernel(
    case="",
    target=CARDS["90"],
    name="gemm_tma_kernel",
    constants={"BM": 128, "BN": 256, "dtype": "16 bit", "aligned": True, "num_stages": 3},
    registers=168,
    spills=0,
    shared=180_000,
    tensor_memory=0,
    mma_sync=0,
    wgmma=5,
    register_form=0,
    pending=1,
    buffers=3,
    tcgen05=0,
    tma=6,
    cp_async=0,
    fma=0,
    waits=0,
    shared_loads=0,
    arrivals=0,
    warnings=(),
)


def test_a_sound_kernel_breaks_no_rule():
    assert codegen.faults(SOUND) == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"spills": 8}, "spills"),
        ({"shared": 232_449}, "shared memory"),
        ({"target": CARDS["80"], "shared": 166_913}, "shared memory"),
        ({"tensor_memory": 513}, "tensor memory"),
        ({"warnings": ("C7515",)}, "ptxas warning"),
        ({"register_form": 1}, "register-form wgmma"),
        ({"tma": 0}, "no TMA"),
        ({"constants": SOUND.constants | {"PDL": True}}, "overlap"),
        ({"wgmma": 0}, "no wgmma"),
        ({"pending": 0}, "wgmma serialised"),
        ({"buffers": 2}, "too few buffers"),
        ({"shared_loads": 2}, "unasked shared loads"),
        ({"target": CARDS["100"]}, "no tcgen05"),
        ({"wgmma": 0}, "no tensor cores"),
        ({"name": "gemm_kernel", "tma": 0}, "no asynchronous loads"),
        (
            {"constants": {"BM": 64, "BN": 64, "dtype": "fp32", "aligned": True}},
            "tensor cores in fp32",
        ),
        ({"constants": {"BM": 64, "BN": 64, "dtype": "fp32", "aligned": True}}, "no FMA"),
    ],
)
def test_each_rule_can_fail(change, rule):
    assert rule in codegen.faults(SOUND._replace(**change))


def test_buffers_are_counted_in_what_is_compiled():
    """A load with two uses, as `dual` had it, gets one too few. In a process of its own."""
    program = """
from unittest import mock

from lora_kernels.backends import codegen
from lora_kernels.backends.codegen.cases import Case
from lora_kernels.backends.triton import tiles

case = Case(plan="dual", N=1024, ops=("forward",))
for twice in (True, False):
    with mock.patch.object(tiles, "dual_loads_twice", lambda *_: twice):
        [kernel] = codegen.compile_case(case, "90", set())
    print(twice, kernel.buffers, codegen.faults(kernel))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], env=_environment(), cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert run.stdout.splitlines() == ["True 3 []", "False 2 ['too few buffers']"]


def test_a_cluster_is_formed_where_the_other_cta_is_asked():
    """What Triton 3.7 makes of one breaks a rule, and 3.6 makes none: both are refused, and no
    tuner is told of it. In a process of its own."""
    program = """
from unittest import mock

from lora_kernels.backends import codegen
from lora_kernels.backends.codegen.cases import Case
from lora_kernels.backends.cuda import needs
from lora_kernels.backends.cuda.plan import Call
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.device import CARDS
from lora_kernels.backends.triton import specialised

[_, launch] = PLANS["gluon"].forward.launches
call = Call("forward", "bfloat16", 8192, 4096, 4096, 16, False)
listed = launch.variants(call, CARDS["90"])
print(needs.has_clusters(), any("cluster" in fields for fields in listed))
case = Case(plan="gluon", ops=("forward",), bias=True)
four, two = (case._replace(tiles={"gemm": {"cluster": size}}) for size in (4, 2))
for each in (four, two):
    try:
        kernels = codegen.compile_case(each, "90", set())
    except ValueError as error:
        print(error)
if specialised.why_no_cluster() is not None:
    with mock.patch.object(specialised, "why_no_cluster", lambda: None):
        kernels = codegen.compile_case(two, "90", set())
kernel = kernels[-1]
print(kernel.name, kernel.shared_loads > 0, kernel.pending, kernel.spills, codegen.faults(kernel))
"""
    if triton_release() < (3, 7):
        pytest.skip("this Triton's Gluon loads for one CTA alone")
    run = subprocess.run(
        [sys.executable, "-c", program], env=_environment(), cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    formed = triton_release() >= (3, 8)
    told, four, *two, compiled = run.stdout.splitlines()
    assert told == f"{formed} {formed}"
    assert four == "cluster: got 4, legal are 1 and 2"
    assert len(two) == (not formed)
    assert formed or two[0].startswith("cluster: got 2, legal is 1: an arrival reaches")
    faults = [] if formed else ["unasked shared loads"]
    assert compiled == f"specialised_gemm_kernel True 1 0 {faults}"


@pytest.mark.parametrize("card", CARDS)
def test_the_tiles_of_a_card_know_its_kind(card):
    """What no Hopper is, RTX 50 and AMD's gfx942 among them, gets no tile or launch of Hopper's."""
    target = CARDS[card]
    wide = card in ("90", "100")
    assert target.has_wide_tiles == wide
    assert target.has_tensor_cores == (card != "75")
    assert launch.overlaps(target) == (wide and not launch.INTERPRETED)
    product = tiles.Product(torch.bfloat16, 8192, 4096, 16, False, True, wide)
    assert (tiles.gemm(target, product).bn == 256) == wide
    assert (tiles.gemm(target, product).bk == 64) == wide


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("r", [1, 16, 32, 64, 128, 200])
def test_stages_follow_the_shared_memory(card, r):
    """Of the steps in flight and what is kept beside them, counted here anew."""
    target, dtype = CARDS[card], torch.bfloat16
    shrink = tiles.shrink(target, dtype, 8192, 4096, r, True)
    step = (shrink.bm + shrink.r) * shrink.bk * 2
    assert shrink.stages == 2 or (shrink.stages - 1) * step + shrink.bm * shrink.bk * 2 <= (
        target.shared
    )
    if card in ("80", "90", "100"):
        assert shrink.stages == 4, "these have room"
    dual = tiles.dual(target, dtype, 16, 4096, r, True)
    step = (dual.bm + dual.bn + tiles.dual_rank(r)) * dual.bk * 2
    assert dual.stages == 2 or (dual.stages - 1) * step <= target.shared


def test_triton_serves_no_card_without_tensor_cores():
    call = Call("forward", "float16", 64, 64, 64, 8, False)
    with assume(CARDS["75"]):
        found = {name: plan.refusal(call) for name, plan in PLANS.items()}
    assert found["aten"] is None
    for name in ("cublas", "shrink_gemm", "dual", "grouped", "flag"):
        assert "no tensor cores for this GPU" in found[name]
    with assume(CARDS["86"]):
        assert PLANS["cublas"].refusal(call) is None


def test_a_part_of_the_matrix_is_made_anew():
    page = f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n"
    first = {("cublas", "80"): "3 compiled", ("mask", "75"): "2 compiled"}
    page = pages.with_matrix(page, first, whole=True)
    assert pages.written(page) == first
    assert page.startswith("before")
    assert page.endswith("after\n")
    assert "old" not in page
    again = pages.with_matrix(page, {("mask", "75"): "4 compiled"}, whole=False)
    assert pages.written(again) == first | {("mask", "75"): "4 compiled"}
    with pytest.raises(ValueError, match="its other cells are not of Triton"):
        pages.with_matrix(page.replace("Triton ", "Triton 0."), first, whole=False)


def test_what_cells_say():
    found = {
        ("shrink_gemm", "90"): [SOUND, SOUND._replace(spills=8)],
        ("shrink_gemm", "89"): [SOUND],
        ("gluon", "90"): [SOUND],
        ("mask", "89"): [SOUND],
    }
    cells = pages.cells(found)
    ran = ", run on H100, H200"
    assert cells["shrink_gemm", "90"] == f"2 compiled, 1 spill, 1 faulty, interpreted{ran}"
    assert cells["shrink_gemm", "89"] == "1 compiled"
    assert cells["gluon", "90"] == f"1 compiled{ran}"
    assert cells["mask", "89"] == "1 compiled, interpreted"
    assert [CARDS[card]._replace(sms=0) for card in cases.INTERPRETED_CARDS] == [
        card._replace(sms=0) for card in (AMPERE, HOPPER)
    ]


@pytest.mark.parametrize("card", CARDS)
def test_every_card_has_the_elementwise_kernels(card):
    served = {case.plan for case in cases.SHORT if cases.is_served(case, CARDS[card])}
    assert served >= set(cases.ELEMENTWISE)
    assert (served == set(cases.ELEMENTWISE)) == (card == "75")
    assert ("gluon" in served) == (card == "90")
