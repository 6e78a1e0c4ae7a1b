"""The plans, one file each, simplest first: a tuner gives ties to the first."""

from __future__ import annotations

from lora_kernels.backends.cuda.plan import Plan
from lora_kernels.backends.cuda.plans import (
    aten,
    cublas,
    decode,
    decode_coded,
    decode_cuda,
    dual,
    flag,
    gluon,
    grouped,
    shrink_gemm,
)

PLANS: dict[str, Plan] = {}


def register(plan: Plan) -> None:
    """Makes a plan known to all that iterate `PLANS`. Raises ValueError if its name is taken."""
    if PLANS.setdefault(plan.name, plan) is not plan:
        raise ValueError(f"plan: the name {plan.name!r} is taken")


for _module in (
    aten, cublas, shrink_gemm, grouped, decode, dual, flag, decode_cuda, gluon, decode_coded
):  # fmt: skip
    register(_module.PLAN)


def known(name: str, where: str) -> Plan:
    """The plan of this name; ValueError lists the legal ones."""
    if name not in PLANS:
        raise ValueError(f"{where}: got {name!r}, legal values are {', '.join(PLANS)}")
    return PLANS[name]
