"""Timing: peers take turns, so drifting clocks and noisy neighbours hit all alike, and a ratio is
the median over the rounds of a peer's time over the frozen layer's in the same round.

On a GPU every turn begins with a cold L2 cache, and times are between events. The cache is emptied
by reading memory, as often as it takes to keep the device busy until the host has launched the
turn: what a call costs on the host is not in these numbers, unless `hide_host` is False;
`test_micro.py` measures that.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch

_READ_SECONDS = 70e-6  # of one emptying of the cache, at least
_MOST_READS = 100

# One turn: calls mark() after each part that is to be timed.
Turn = Callable[[Callable[[], None]], None]


class Deadline:
    """The time box of a whole run."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds, negative when it is over."""
        return self._end - time.monotonic()


@cache
def _flush_buffer(index: int) -> torch.Tensor:
    size = 4 * torch.cuda.get_device_properties(index).L2_cache_size
    return torch.empty(max(size, 256 << 20) // 4, dtype=torch.int32, device="cuda").random_()


def cold() -> None:
    """Empty the L2 cache by reading: lines left by writing would be written back on the clock."""
    _flush_buffer(torch.cuda.current_device()).amax()


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """The function's launches as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _turn_on_cpu(turn: Turn) -> list[float]:
    marks = [time.perf_counter()]
    turn(lambda: marks.append(time.perf_counter()))
    return marks


def _reads_to_hide(turns: Iterable[Turn]) -> int:
    """How often to read, so that the device is not done before the host has launched a turn."""
    slowest = 0.0
    for turn in turns:
        begin = time.perf_counter()
        turn(lambda: torch.cuda.Event(enable_timing=True).record())
        slowest = max(slowest, time.perf_counter() - begin)
        torch.cuda.synchronize()
    return min(math.ceil(1.5 * slowest / _READ_SECONDS) + 1, _MOST_READS)


def _turn_on_gpu(turn: Turn, reads: int = 1) -> list[torch.cuda.Event]:
    marks: list[torch.cuda.Event] = []

    def mark() -> None:
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()

    for _ in range(reads):
        cold()
    mark()
    turn(mark)
    return marks


def _parts(marks: list[Any]) -> list[float]:
    """Seconds between neighbouring marks."""
    if isinstance(marks[0], float):
        return [b - a for a, b in pairwise(marks)]
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def interleaved(
    turns: Mapping[str, Turn],
    device: torch.device,
    seconds: float,
    rounds: tuple[int, int],
    warm: bool = True,
    hide_host: bool = True,
) -> dict[str, list[list[float]]]:
    """name -> one entry a round: the seconds of each part. At least `rounds[0]`, at most
    `rounds[1]` rounds; between the two it ends when `seconds` are over."""
    gpu = device.type == "cuda"
    once = _turn_on_gpu if gpu else _turn_on_cpu
    if warm:
        for turn in turns.values():
            once(turn)
    if gpu:
        torch.cuda.synchronize()
        once = partial(_turn_on_gpu, reads=_reads_to_hide(turns.values()) if hide_host else 1)
    times: dict[str, list[list[float]]] = {name: [] for name in turns}
    begin, done = time.monotonic(), 0
    while done < rounds[0] or (done < rounds[1] and time.monotonic() - begin < seconds):
        marks = {name: once(turn) for name, turn in turns.items()}
        if gpu:
            torch.cuda.synchronize()
        for name, of_turn in marks.items():
            times[name].append(_parts(of_turn))
        done += 1
    return times


def summary(seconds: Iterable[float], base: Iterable[float]) -> dict[str, float]:
    """Median milliseconds, and median, 20 % and 80 % quantile of the paired ratios to base."""
    mine = list(seconds)
    ratios = [a / b for a, b in zip(mine, base, strict=True)]
    cuts = statistics.quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else ratios
    return {
        "ms": round(statistics.median(mine) * 1e3, 4),
        "ratio": round(statistics.median(ratios), 4),
        "p20": round(cuts[0], 4),
        "p80": round(cuts[-1], 4),
    }
