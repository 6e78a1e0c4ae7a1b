"""The kernel of `dual` for a few rows: the weight is streamed once."""

from dataclasses import replace

from lora_kernels.backends.cuda.plans import dual

PLAN = replace(
    dual.PLAN,
    name="decode",
    summary="forward in one launch for M <= 64, every program recomputes s",
    forward=replace(dual.PLAN.forward, most_rows=64),
)
