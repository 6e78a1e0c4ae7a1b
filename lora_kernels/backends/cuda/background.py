"""A GPU without a table. LORA_KERNELS_TUNE=hint: its first call says what makes one. check: it is
tuned beside the first process that uses it, for those that come after; in this one no bits change.
"""

import logging
import os
import shutil
import subprocess
import sys
from functools import cache

import torch

from lora_kernels import _env
from lora_kernels.backends.cuda import needs, tables

_logger = logging.getLogger("lora_kernels")
# A kind of call for training and one for decoding; what a model needs, `tune(model)` adds.
COMMAND = ("-m", "lora_kernels", "tune", "--rows", "2048", "16", "--shapes", "4096,4096,16",
           "--minutes", "1")  # fmt: skip


@cache
def hint(device: torch.device) -> None:
    """Of every call of a GPU that no plan serves by default, and once said: what does, and what
    would have the plans serve it. One process of a node says it."""
    if _env.TUNE == "off" or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    index = tables.index_of(device)
    absent, lacking = tables.why_none(index), needs.why_no_triton()
    if absent is None:
        return  # another reason than a table's
    begun = "they are being proven in the background now, for later processes"
    command = "`python -m lora_kernels tune` proves and times them on this card, once"
    what = lacking or (begun if _env.TUNE == "check" else command)
    _logger.warning(
        "%s: LoRA calls run as plain ATen calls, without the fused kernels (%s): %s."
        " LORA_KERNELS_TUNE=off says nothing.",
        torch.cuda.get_device_name(index), absent.removesuffix(tables.cure()), what,
    )  # fmt: skip


def begin() -> None:
    """Spawns the command at low priority. Not in a process of several, of which each would, nor
    while a graph is captured or compiled."""
    if _env.TUNE != "check" or "LOCAL_RANK" in os.environ:
        return
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return
    lowly = ("nice", "-n", "19") if shutil.which("nice") else ()
    try:
        subprocess.Popen(
            [*lowly, sys.executable, *COMMAND],
            env=os.environ | {"LORA_KERNELS_TUNE": "off"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:  # the call that asked goes on
        _logger.warning("LORA_KERNELS_TUNE=check: tuning could not be begun: %s", error)
