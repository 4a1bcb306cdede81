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
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timing import forget_peak, in_turns, kilobytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PASSES = {"forward": False, "forward+backward": True}


@dataclass(frozen=True)
class Case:
    """One measurement's setting."""

    arm: str
    length: int
    backward: bool
    device: str
    dtype: str
    heads: int
    kv_heads: int
    width: int
    buckets: int
    max_distance: int

    def operations(self) -> float:
        """Floating-point operations of the pairs that are seen: two products forward, five backward."""
        return 4 * self.heads * self.length**2 / 2 * self.width * (3.5 if self.backward else 1)

    def bytes_of_a_bias(self) -> int:
        """Of one tensor (heads, N, N) in the dtype."""
        return self.heads * self.length**2 * getattr(torch, self.dtype).itemsize


class LogTail(nn.Module):
    """T5's table, and past its reach a fall with log(offset), one slope a head: no constant end."""

    def __init__(self, table: nn.Module, heads: int, start: int) -> None:
        super().__init__()
        self.table, self.start = table, start
        self.slope = nn.Parameter(torch.rand(heads))

    def forward(self, offset: Tensor) -> Tensor:
        """Offsets (n,) to (heads, n)."""
        tail = (offset.clamp(min=self.start) / self.start).log()
        return self.table(offset) - self.slope[:, None] * tail


Arm = Callable[[Tensor, Tensor, Tensor], Tensor]


def no_bias(case: Case) -> tuple[Arm, list[Tensor]]:
    """PyTorch's causal attention."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])

    return run, []


def no_bias_by_cudnn(case: Case) -> tuple[Arm, list[Tensor]]:
    """The same by cuDNN: on Hopper the fastest that PyTorch offers."""
    run, parameters = no_bias(case)

    def run_by_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return run(q, k, v)

    return run_by_cudnn, parameters


def ours(case: Case, log_tail: bool = False) -> tuple[Arm, list[Tensor]]:
    """This project's."""
    from rpb_retrofit.runtime.attention import attention
    from rpb_retrofit.runtime.bias import RelativePositionBias
    from rpb_retrofit.runtime.buckets import Bucketing

    table = RelativePositionBias(case.heads, Bucketing(case.buckets, case.max_distance, False))
    nn.init.normal_(table.weight)
    bias = (LogTail(table, case.heads, case.max_distance) if log_tail else table).to(case.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, bias, scale=case.width**-0.5, causal=True).output

    return run, list(bias.parameters())


def position_bias(case: Case, flex: bool = False) -> tuple[Arm, list[Tensor]]:
    """Transformers' own: a T5 attention makes the bias (heads, N, N), sdpa or flex_attention takes it."""
    from transformers import T5Config
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, flex_attention_mask
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        num_heads=case.heads,
        d_kv=case.width,
        d_model=case.heads * case.width,
        relative_attention_num_buckets=case.buckets,
        relative_attention_max_distance=case.max_distance,
        is_decoder=True,
    )
    t5 = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).to(case.device)
    module = SimpleNamespace(num_key_value_groups=case.heads // case.kv_heads, is_causal=True, training=True)
    forward: Any = flex_attention_forward if flex else sdpa_attention_forward
    n = case.length
    mask = flex_attention_mask(1, n, n, mask_function=causal_mask_function, device=case.device) if flex else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = t5.compute_bias(n, n).to(q.dtype)
        return forward(module, q, k, v, mask, scaling=case.width**-0.5, position_bias=bias)[0].transpose(1, 2)

    return run, [t5.relative_attention_bias.weight]


CUDNN = "no bias, cuDNN"

ARMS: dict[str, Callable[[Case], tuple[Arm, list[Tensor]]]] = {
    "no bias": no_bias,
    CUDNN: no_bias_by_cudnn,
    "ours": ours,
    "ours, log tail": lambda case: ours(case, log_tail=True),
    "position_bias, sdpa": position_bias,
    "position_bias, flex": lambda case: position_bias(case, flex=True),
}


def prepare(case: Case) -> Callable[[], None]:
    """A function that runs the case once."""
    torch.manual_seed(0)
    arm, parameters = ARMS[case.arm](case)
    shape = (1, case.length, case.heads + 2 * case.kv_heads, case.width)  # laid out as models do
    options: Any = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    q, k, v = (
        x.detach().requires_grad_(case.backward)
        for x in torch.randn(shape, **options).transpose(1, 2).split([case.heads, case.kv_heads, case.kv_heads], 1)
    )
    upstream = torch.randn(1, case.length, case.heads, case.width, **options).transpose(1, 2)

    def run() -> None:
        if case.backward:
            torch.autograd.grad(arm(q, k, v), [q, k, v, *parameters], upstream)
        else:
            with torch.no_grad():
                arm(q, k, v)
        if case.device == "cuda":
            torch.cuda.synchronize()

    return run


def peak_megabytes(case: Case, threads: int) -> float:
    """What one run takes above its inputs; in a process of its own."""
    torch.set_num_threads(threads)
    prepare(replace(case, length=64))()  # what is loaded and allocated once is not the case's
    run = prepare(case)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
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


def main() -> None:
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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    arms = options.arms or [arm for arm in ARMS if arm != CUDNN or options.device == "cuda"]
    settings = {
        "device": options.device,
        "dtype": options.dtype,
        "heads": options.heads,
        "kv_heads": options.kv_heads or options.heads,
        "width": options.width,
        "buckets": options.buckets,
        "max_distance": options.max_distance,
    }
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {options.threads} threads"
    title = (
        f"{name}, {options.dtype}, {options.heads} heads ({settings['kv_heads']} key-value) of {options.width}, "
        f"{options.buckets} buckets to {options.max_distance}, torch {torch.__version__}"
    )
    print(title)
    if options.device == "cuda":
        free = float(torch.cuda.mem_get_info()[0])
    else:
        free = 1e3 * kilobytes("/proc/meminfo", "MemAvailable")
    rows: list[dict[str, Any]] = []
    for length in options.lengths:
        for way in options.passes:
            cases = [Case(arm, length, PASSES[way], **settings) for arm in arms]
            for case in [case for case in cases if not fits(case, free)]:
                print(f"  {case.arm}: one bias at {length} takes {case.bytes_of_a_bias() / 1e9:.1f} GB: left out")
                cases.remove(case)
            timings, ratios = in_turns(prepared(cases), options.seconds)
            rate = f"{'TFLOP/s':>10}" if options.device == "cuda" else ""
            first = "/ " + cases[0].arm
            print(f"{length:6} {way:18}{'ms':>10}{'quartiles':>20}{first:>11}{'peak MB':>10}{rate}  rounds")
            for case in [case for case in cases if case.arm in timings]:
                peak, timing, ratio = None, timings[case.arm], ratios[case.arm]
                if not options.no_memory:
                    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                        peak = pool.submit(peak_megabytes, case, options.threads).result()
                shown = "" if peak is None else f"{peak:.0f}"
                rate = f"{case.operations() / timing.median / 1e12:10.0f}" if options.device == "cuda" else ""
                print(f"       {case.arm:18}{timing}{ratio:11.2f}{shown:>10}{rate}  {timing.rounds}", flush=True)
                rows.append(
                    {"length": length, "pass": way, "arm": case.arm, **timing._asdict(), "ratio": ratio, "peak": peak}
                )
        if options.json:
            from rpb_retrofit.files.strict_json import json_text

            options.json.write_text(json_text({"title": title, "rows": rows}, indent=1))
        if options.plot:
            plot(rows, title, options.plot)


if __name__ == "__main__":
    main()
