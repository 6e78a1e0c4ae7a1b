"""The forward of a quantised weight by a plan that reads its codes: where one is forced, or where
the table of the GPU has proven it to be right and faster.

Else, and where the table says "aten", the weight is decoded by strips (`dequantized`), and the
branch added as to any base output.
"""

from __future__ import annotations

from torch import Tensor

from lora_kernels.backends import forced
from lora_kernels.backends.cuda import choice, needs
from lora_kernels.backends.cuda.plan import Call, Coded
from lora_kernels.backends.cuda.plans import PLANS
from lora_kernels.backends.cuda.tables import Choice
from lora_kernels.branch import Branch
from lora_kernels.weights import QuantizedWeight, kind_of

_WHERE_FORCED = "decode_coded"  # with the backend


def chosen(x: Tensor, weight: QuantizedWeight, branch: Branch) -> Choice | None:
    """The plan of rows x [M,K]; None where strips are decoded. Raises RuntimeError where a plan is
    forced that serves quantised weights, but not this call."""
    force = forced.now
    if not len(x) or not _may_be_here(x, force):
        return None
    kind = kind_of(weight)
    if kind is None:
        return None
    dtype = str(x.dtype).removeprefix("torch.")
    M, (N, K), r = x.shape[0], weight.shape, branch.lora_a.shape[0]
    call = Call("coded", dtype, M, N, K, r, branch.dropout_p > 0, weight=kind)
    if force is None:
        choice.watch()
        found = choice.choose(call, x.device)
        return None if PLANS[found.plan].coded is None else found
    if force.plan is not None:
        return None if PLANS[force.plan].coded is None else choice.choose(call, x.device)
    return Choice(_WHERE_FORCED, {}) if PLANS[_WHERE_FORCED].refusal(call) is None else None


def _may_be_here(x: Tensor, force: forced.Force | None) -> bool:
    if force is None:
        return x.is_cuda
    return force.backend in ("cuda", "triton") and needs.runs_on(x)


def forward(
    plan: Choice, base: Coded, x: Tensor, branch: Branch, save_s: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, s)."""
    serving = PLANS[plan.plan].coded
    assert serving is not None  # or `chosen` had not taken it
    with needs.device_of(x):
        return serving.run(base, x, branch, save_s, plan.tiles)
