"""LORA_KERNELS_TUNE=check: a GPU without a table is tuned beside the first process that uses it,
for those that come after; in this one no bits change."""

import logging
import os
import shutil
import subprocess
import sys

import torch

from lora_kernels import _env

_logger = logging.getLogger("lora_kernels")
# A kind of call for training and one for decoding; what a model needs, `tune(model)` adds.
COMMAND = ("-m", "lora_kernels", "tune", "--rows", "2048", "16", "--shapes", "4096,4096,16",
           "--minutes", "1")  # fmt: skip


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
