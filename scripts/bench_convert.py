"""What `rpb retrofit` costs on a large checkpoint: wall time and peak memory, beside copying its folder.

Makes a sharded Llama checkpoint of random bfloat16 weights in a temporary folder (``--gigabytes``), then times, in
turns, a plain copy of the folder, `rpb retrofit` and `rpb retrofit --link`. Prints the median of each, the ratio to
the copy, and the peak resident memory of the command's process.

    python scripts/bench_convert.py --gigabytes 4
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path


def make_checkpoint(folder: Path, gigabytes: float, shard_bytes: int = 1 << 30) -> int:
    """Write a Llama checkpoint of about that size in shards; its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    hidden = 2048
    per_layer = 2 * (4 * hidden**2 + 3 * hidden * 4 * hidden)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=16,
        num_hidden_layers=max(1, round(gigabytes * 1e9 / per_layer)),
        vocab_size=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"), no_init_weights():
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    groups: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled + 2 * shape.numel() > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += 2 * shape.numel()
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in group.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    total = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    return total


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; it needs three times the space")
    options = parser.parse_args()
    rpb = [sys.executable, "-c", "from rpb_retrofit.cli import main; main()", "retrofit"]
    arms: dict[str, Callable[[str, str], list[str]]] = {
        "copy of the folder": lambda source, out: ["cp", "-r", "--reflink=never", source, out],
        "rpb retrofit": lambda source, out: [*rpb, source, out, "--init", "zeros"],
        "rpb retrofit --link": lambda source, out: [*rpb, source, out, "--init", "zeros", "--link"],
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        source, out = Path(work) / "source", Path(work) / "out"
        source.mkdir()
        # In a process of its own: a child's peak memory begins with its parent's.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            size = pool.submit(make_checkpoint, source, options.gigabytes).result()
        print(f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards, {options.repeats} repeats")
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
        for _ in range(options.repeats):
            for name, command in arms.items():
                os.sync()  # no arm pays for the pages that the one before it left to write
                measured[name].append(run(command(str(source), str(out))))
                shutil.rmtree(out)
    base = statistics.median(seconds for seconds, _ in measured["copy of the folder"])
    print(f"{'':24}{'seconds':>9}{'spread':>16}{'ratio':>8}{'peak MB':>9}")
    for name, runs in measured.items():
        seconds = sorted(second for second, _ in runs)
        median, spread = statistics.median(seconds), f"{seconds[0]:.1f} to {seconds[-1]:.1f}"
        print(f"{name:24}{median:9.1f}{spread:>16}{median / base:8.2f}{max(peak for _, peak in runs):9.0f}")


if __name__ == "__main__":
    main()
