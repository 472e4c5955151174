"""Times what is compared, in rounds: each contestant once a round, in an order that chance gives.

What the machine does to one of a round it mostly does to the others, so ratios are taken within rounds.
"""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from measuring import spread
from torch import Tensor
from tqdm.auto import tqdm


@dataclass
class Rounds:
    """What was measured."""

    seconds: dict[str, list[float]]
    """By contestant, one number a round."""
    left_out: dict[str, float]
    """The seconds in warm-up of contestants that were too slow to go on with."""


def in_rounds(
    contestants: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    warmup: int,
    seed: int,
    peers: Collection[str] = (),
    hopeless: float = 0.0,
    show: bool = True,
) -> Rounds:
    """Measures each contestant once a round.

    Args:
        contestants: each does its work once and returns the seconds it took.
        warmup: rounds before those that are measured.
        peers: contestants of which those that take `hopeless` times the fastest's seconds in the last round of the
            warm-up are left out; 0 leaves none out.
    """
    running, left_out = dict(contestants), {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in tqdm(range(-warmup, rounds), unit="round", leave=False, disable=not show):
        names = list(running)
        Random(f"{seed}, {number}").shuffle(names)  # the same in every process
        for name in names:
            seconds[name].append(running[name]())
        if number == -1:
            last = {name: times[-1] for name, times in seconds.items()}
            fastest = min((last[name] for name in peers), default=0.0)
            left_out = {name: last[name] for name in peers if hopeless and last[name] > hopeless * fastest}
            running = {name: run for name, run in running.items() if name not in left_out}
            seconds = {name: [] for name in running}
    return Rounds(seconds, left_out)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of `work`, until the device has done it."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    """Waits until the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


class MatmulPeak:
    """A product that the machine does well, a contestant like the others: what it reaches at that moment.

    Two square matrices that stay where they are, on a CPU of a width at which one thread is fast.

    Args:
        product: of the two.
        seconds: of a turn, about.
    """

    def __init__(
        self, product: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, device: str, seconds: float = 0.1
    ) -> None:
        self.size = 8192 if device == "cuda" else 1024
        self.flops = 2 * self.size**3
        self.product, self.device, self.seconds = product, device, seconds
        self.left, self.right = (torch.randn(self.size, self.size, device=device, dtype=dtype) for _ in range(2))

    def __call__(self) -> float:
        """Seconds of a product, the median of a turn."""
        measured: list[float] = []
        end = time.perf_counter() + self.seconds
        while not measured or time.perf_counter() < end:
            measured.append(timed(lambda: self.product(self.left, self.right), self.device))
        return float(np.median(measured))


def matmul_peaks(dtype: torch.dtype, device: str) -> dict[str, MatmulPeak]:
    """`torch.mm`, by which models multiply; and in fp32 on a CPU also oneDNN's product, where torch has it: `torch.mm`
    is MKL's there, which is slow on some makers' CPUs."""
    peaks = {"torch.mm": MatmulPeak(torch.mm, dtype, device)}
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        peaks["oneDNN"] = MatmulPeak(lambda left, right: linear(left, right, None, "none", [], ""), dtype, device)
    return peaks


def performance(
    rounds: Rounds,
    peaks: Mapping[str, MatmulPeak],
    *,
    seed: int,
    tokens: int | None = None,
    flops: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Of each contestant: median seconds, tokens/s, GFLOP/s and the fraction of each peak, as a ratio within rounds.

    Args:
        peaks: those of the contestants that are products.
        tokens: of one turn of any other.
        flops: likewise.
    """
    found = {}
    for name, seconds in rounds.seconds.items():
        if name in peaks:
            continue
        record: dict[str, Any] = {"seconds": seconds, "median_seconds": float(np.median(seconds))}
        if tokens is not None:
            record["tokens_per_second"] = tokens / record["median_seconds"]
        if flops is not None:
            record["gflops"] = flops / record["median_seconds"] / 1e9
            record["fraction_of_peak"] = {
                peak: spread(np.divide(rounds.seconds[peak], seconds) * flops / product.flops, seed)
                for peak, product in peaks.items()
            }
        found[name] = record
    return found


def peak_performance(rounds: Rounds, peaks: Mapping[str, MatmulPeak]) -> dict[str, dict[str, Any]]:
    """Of each product: its size, median seconds and GFLOP/s."""
    found = {}
    for name, peak in peaks.items():
        seconds = rounds.seconds[name]
        median = float(np.median(seconds))
        found[name] = {
            "size": peak.size,
            "seconds": seconds,
            "median_seconds": median,
            "gflops": peak.flops / median / 1e9,
        }
    return found


def speedups(rounds: Rounds, ours: str, peers: Collection[str], seed: int) -> tuple[str, dict[str, dict[str, Any]]]:
    """The fastest peer by its median; and by each peer, how many times its seconds are ours, within rounds."""
    seconds = rounds.seconds
    measured = [name for name in peers if name in seconds]
    fastest = min(measured, key=lambda name: np.median(seconds[name]))
    return fastest, {name: spread(np.divide(seconds[name], seconds[ours]), seed) for name in measured}


def print_performance(found: dict[str, Any]) -> None:
    """What `performance`, `peak_performance` and `speedups` say, with the contestants that were left out."""
    peaks = found.get("peaks", {})
    print(f"{'':24} {'seconds':>9} {'tokens/s':>9} {'GFLOP/s':>9}" + "".join(f"  of {peak}" for peak in peaks))
    for name, record in found["contestants"].items():
        line = f"{name:24} {record['median_seconds']:9.4f}"
        line += f" {record['tokens_per_second']:9.0f}" if "tokens_per_second" in record else f" {'':9}"
        if "gflops" in record:
            fractions = record["fraction_of_peak"]
            line += f" {record['gflops']:9.1f}" + "".join(
                f"{fractions[peak]['ratio']:{len(peak) + 5}.3f}" for peak in peaks
            )
        print(line)
    for name, record in peaks.items():
        print(f"{name:24} {record['median_seconds']:9.4f} {'':9} {record['gflops']:9.1f}")
    for name, seconds in found["left_out"].items():
        print(f"{name:24} {seconds:9.4f} in warm-up: left out")
    for name, ratio in found["speedups"].items():
        print(f"ours against {name}: {described(ratio)}")


def described(ratio: dict[str, Any]) -> str:
    """A ratio with its spread, in words."""
    (low, high), (least, most) = ratio["ratio_quartiles"], ratio["ratio_interval_95"]
    return f"{ratio['ratio']:.3f} (quartiles {low:.3f} {high:.3f}; 95% of the median {least:.3f} {most:.3f})"
