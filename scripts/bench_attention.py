"""Attention with the relative position bias beside attention without a bias: time and peak memory against length.

Arms, in one run and in random turns: no bias (PyTorch's causal attention; on a GPU also that of cuDNN), ours with T5's
table and with a logarithmic tail behind it (which has no constant end), Transformers' ``position_bias`` through its
sdpa and its flex_attention. Each forward makes its bias from the parameters; each backward reaches query, key, value
and those parameters.

Prints a table (median, quartiles, ratio to no bias; on a GPU TFLOP/s) and, with --plot, draws time and memory by
length with slopes.
Peak memory is that of a fresh process on a CPU, PyTorch's own count on a GPU, above what the inputs take.

    python scripts/bench_attention.py
    python scripts/bench_attention.py --device cuda --dtype bfloat16 --heads 16 --width 128
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from attention_arms import ARMS, CUDNN, Case, prepare
from timing import forget_peak, in_turns, kilobytes

PASSES = {"forward": False, "forward+backward": True}


def peak_megabytes(case: Case, threads: int) -> float:
    """What one run takes above its inputs; in a process of its own."""
    torch.set_num_threads(threads)
    prepare(replace(case, length=64))()  # what is loaded and allocated once is not the case's
    run = prepare(case)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - allocated) / 1e6
    forget_peak()
    before = kilobytes("/proc/self/status", "VmRSS")
    run()
    return (kilobytes("/proc/self/status", "VmHWM") - before) / 1e3


def fits(case: Case, bytes_free: float) -> bool:
    """Whether a materialised arm can run at all: its bias, its mask and their gradients or copies."""
    return "position_bias" not in case.arm or (6 if case.backward else 4) * case.bytes_of_a_bias() < bytes_free


def prepared(cases: list[Case]) -> dict[str, Callable[[], None]]:
    """The cases by arm, without those that the device cannot run, which are named."""
    runs = {}
    for case in cases:
        try:
            run = prepare(case)
            run()
        except (NotImplementedError, RuntimeError) as error:
            print(f"  {case.arm}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        else:
            runs[case.arm] = run
    return runs


def plot(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Time and memory by length, on logarithmic axes; the legend gives the slope over the last doubling."""
    import matplotlib

    matplotlib.use("Agg")
    from math import log2

    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.8))
    panels = [("forward", "median"), ("forward+backward", "median"), ("forward+backward", "peak")]
    for axis, (way, what) in zip(axes, panels, strict=True):
        for arm in ARMS:
            points = [(r["length"], r[what]) for r in rows if r["arm"] == arm and r["pass"] == way and r.get(what)]
            if points:
                slope = f", slope {log2(points[-1][1] / points[-2][1]):.1f}" if len(points) > 1 else ""
                axis.plot(*zip(*points, strict=True), marker="o", label=arm + slope)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="length",
            ylabel={"median": "seconds", "peak": "peak memory, MB"}[what],
            title=way,
        )
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, help="by default as many as heads")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--buckets", type=int, default=32)
    parser.add_argument("--max-distance", type=int, default=128)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="by default all that the device has")
    parser.add_argument("--passes", nargs="+", choices=list(PASSES), default=list(PASSES))
    parser.add_argument("--seconds", type=float, default=20, help="per length and pass; at least three rounds run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--plot", type=Path, help="a PNG file to draw")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    return parser.parse_args()


def title_of(options: argparse.Namespace) -> str:
    """The device and the setting in words."""
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {options.threads} threads"
    return (
        f"{name}, {options.dtype}, {options.heads} heads ({options.kv_heads or options.heads} key-value) of "
        f"{options.width}, {options.buckets} buckets to {options.max_distance}, torch {torch.__version__}"
    )


def bytes_free(device: str) -> float:
    """Memory that is available."""
    return float(torch.cuda.mem_get_info()[0]) if device == "cuda" else 1e3 * kilobytes("/proc/meminfo", "MemAvailable")


def cases_of(options: argparse.Namespace, length: int, way: str, free: float) -> list[Case]:
    """One case an arm, without those whose bias does not fit into the free bytes, which are named."""
    arms = options.arms or [arm for arm in ARMS if arm != CUDNN or options.device == "cuda"]
    settings = {
        name: getattr(options, name) for name in ("device", "dtype", "heads", "width", "buckets", "max_distance")
    }
    cases = [Case(arm, length, PASSES[way], kv_heads=options.kv_heads or options.heads, **settings) for arm in arms]
    for case in [case for case in cases if not fits(case, free)]:
        print(f"  {case.arm}: one bias at {length} takes {case.bytes_of_a_bias() / 1e9:.1f} GB: left out")
        cases.remove(case)
    return cases


def measure(options: argparse.Namespace, cases: list[Case], way: str) -> list[dict[str, Any]]:
    """Time the cases of one length and pass, print their lines of the table, and return them as rows."""
    timings, ratios = in_turns(prepared(cases), options.seconds)
    rate = f"{'TFLOP/s':>10}" if options.device == "cuda" else ""
    first = "/ " + cases[0].arm
    print(f"{cases[0].length:6} {way:18}{'ms':>10}{'quartiles':>20}{first:>11}{'peak MB':>10}{rate}  rounds")
    rows = []
    for case in [case for case in cases if case.arm in timings]:
        peak, timing, ratio = None, timings[case.arm], ratios[case.arm]
        if not options.no_memory:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                peak = pool.submit(peak_megabytes, case, options.threads).result()
        shown = "" if peak is None else f"{peak:.0f}"
        rate = f"{case.operations() / timing.median / 1e12:10.0f}" if options.device == "cuda" else ""
        print(f"       {case.arm:18}{timing}{ratio:11.2f}{shown:>10}{rate}  {timing.rounds}", flush=True)
        rows.append(
            {"length": case.length, "pass": way, "arm": case.arm, **timing._asdict(), "ratio": ratio, "peak": peak}
        )
    return rows


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    title = title_of(options)
    print(title)
    free = bytes_free(options.device)
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for way in options.passes:
            rows += measure(options, cases_of(options, length, way, free), way)
        if options.json:
            from rpb_retrofit.files.strict_json import json_text

            options.json.write_text(json_text({"title": title, "rows": rows}, indent=1))
        if options.plot:
            plot(rows, title, options.plot)


if __name__ == "__main__":
    main()
