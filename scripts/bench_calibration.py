"""What each way to fill the tables costs, in nats, seconds and memory, and what a span that comes again far below still
gains: on SmolLM2-135M-Instruct, untrained.

Each arm runs in a fresh process: it retrofits the model, calibrating on one text where it calibrates, then scores a
text of another kind, the same tokens for every arm. Memory is the process' peak; beside it stands that of a process
which runs the source once on a window of calibration's length.

    python scripts/bench_calibration.py --calibration proceedings.txt --data novel.txt
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from timing import forget_peak, kilobytes

LENGTHS = (512, 2048)

LONG = ((0, 2048), (2048, 4096), (4096, 8192), (8192, 10240), (10240, 12288), (12288, 16384))
"""With --long: positions in one window of 16,384 tokens, twice what the source was trained on."""

SPANS = {512: 4, 1024: 4, 2048: 4}
"""Spans that are measured, by the tokens from where one stands to where it comes again."""

FAR = {"relative_attention_num_buckets": 64, "relative_attention_max_distance": 2048}
CONTENT = {"calibrate": "tables+content"}

ARMS: dict[str, dict[str, Any]] = {
    "zeros": {"init": "zeros"},
    "alibi": {"init": "alibi"},
    "tables": {},
    "tables, auto buckets": {"relative_attention_num_buckets": "auto"},
    "tables+content": CONTENT,
    "tables+content, polished": {**CONTENT, "polish": 100},
    "16 kept, tables": {"keep_frequencies": 16, **FAR},
    "16 kept, tables+content": {"keep_frequencies": 16, **FAR, **CONTENT},
    "20 kept, tables": {"keep_frequencies": 20, **FAR},
    "20 kept, tables+content": {"keep_frequencies": 20, **FAR, **CONTENT},
    "24 kept, tables": {"keep_frequencies": 24, **FAR},
    "24 kept, tables+content": {"keep_frequencies": 24, **FAR, **CONTENT},
    "auto kept, tables": {"keep_frequencies": "auto", **FAR},
    "auto kept, tables+content": {"keep_frequencies": "auto", **FAR, **CONTENT},
    "auto kept, all in 4 layers, tables+content": {
        "keep_frequencies": "auto+4",
        **FAR,
        **CONTENT,
    },
    "20 kept, tables+content, log tail to 8192": {
        "keep_frequencies": 20,
        "relative_attention_num_buckets": 64,
        "relative_attention_max_distance": 8192,
        "tail": "log",
        **CONTENT,
    },
}


def score(model: Any, documents: list[Any], tokens: int, long: bool) -> dict[str, float]:
    """Losses in nats a token: by length, or by position in one long window."""
    from rpb_retrofit.evaluation.nll import Windows, nll_at_length, token_losses

    if not long:
        return {str(n): nll_at_length(model, documents, Windows(n, n, None), tokens).nll for n in LENGTHS}
    import torch

    with torch.inference_mode():
        losses = token_losses(model, max(documents, key=len)[: LONG[-1][1]].to(model.device))
    return {f"{first}-{end}": losses[max(first, 1) - 1 : end - 1].double().mean().item() for first, end in LONG}


def measure(arm: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """One arm, or the source (None)."""
    import torch

    import rpb_retrofit as rpb
    from rpb_retrofit.checkpoint.gguf import load_gguf
    from rpb_retrofit.demo.fetch import SMOLLM2, fetch
    from rpb_retrofit.evaluation.context_use import induction_gains
    from rpb_retrofit.text.calibration_text import CalibrationText
    from rpb_retrofit.text.reading import read_text
    from rpb_retrofit.text.tokens import tokenise

    model, tokenizer = load_gguf(options.source or fetch(SMOLLM2))
    model.to(options.device)
    record: dict[str, Any] = {"arm": arm or "source"}
    forget_peak()  # dequantising the file took more than what comes now
    if arm is None:
        with torch.no_grad():
            model(torch.arange(1000, 3048)[None].to(options.device), use_cache=False)
    else:
        config = rpb.RetrofitConfig(**ARMS[arm])
        cut = {"tokens": options.calibration_tokens, "length": options.calibration_length}
        cut["repeats"] = options.calibration_repeats
        cut = {name: value for name, value in cut.items() if value is not None}
        text = CalibrationText.of(options.calibration, **cut)
        texts = {"calibration": text.windows(tokenizer, 8192)} if config.init == "calibrated" else {}
        if config.polish:
            texts["polishing"] = text.polishing(tokenizer, 8192, config.polish)
        start = time.perf_counter()
        report = rpb.retrofit(model, config, **texts)
        record |= {"seconds": time.perf_counter() - start, "report": str(report)}
    record["gigabytes"] = kilobytes("/proc/self/status", "VmHWM") / 1e6
    documents = tokenise(tokenizer, read_text(options.data).documents)
    record["losses"] = score(model, documents, options.tokens, options.long)
    if not options.long:
        gains = induction_gains(model, documents, SPANS)
        record["gains"] = {str(distance): fmean(each) for distance, each in gains.items()}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="text to score, as of `rpb evaluate`")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of it")
    parser.add_argument("--calibration", help="text to calibrate and to polish on. Default: Python's help texts")
    parser.add_argument("--calibration-tokens", type=int, help="tokens of it. Default: as of `rpb retrofit`")
    parser.add_argument("--calibration-length", type=int, help="tokens of a window of it. Default: likewise")
    parser.add_argument("--calibration-repeats", type=float, help="share of it that comes again. Default: likewise")
    parser.add_argument("--long", action="store_true", help="score one window of 16,384 tokens, by position")
    parser.add_argument("--source", type=Path, help="the GGUF file, where it need not be fetched")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="memory is the CPU's in either case")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for arm in (None, *options.arms):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            rows.append(fresh.submit(measure, arm, options).result())
        source, row = rows[0]["losses"], rows[-1]
        costs = "  ".join(f"{at}: {loss:.3f} ({loss - source[at]:+.3f})" for at, loss in row["losses"].items())
        spans = "  ".join(f"{at}: {gain:.1f}" for at, gain in row.get("gains", {}).items())
        spans = f"  span gain {spans}" if spans else ""
        print(f"{row['arm']:24s} {row.get('seconds', 0):6.0f} s  {row['gigabytes']:.2f} GB  {costs}{spans}", flush=True)
        if options.json:
            from rpb_retrofit.files.strict_json import json_text

            options.json.write_text(json_text(rows))


if __name__ == "__main__":
    main()
