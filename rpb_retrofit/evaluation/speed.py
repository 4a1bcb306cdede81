"""Speed and memory of causal models by prompt length: reading the prompt, the first token, and those after it.

Several models are measured in one call, in turns: on a machine that others use, only ratios within one run mean much.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError, DataError, UnsupportedModelError
from rpb_retrofit.evaluation.nll import check_length


@dataclass(frozen=True)
class Seconds:
    """The median and quartiles of some seconds, and those of ``each`` round, in the order in which they ran."""

    low: float
    median: float
    high: float
    each: tuple[float, ...]

    @classmethod
    def of(cls, each: Sequence[float]) -> Seconds:
        """Of one round, all three are that round's."""
        low, median, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else [*each] * 3
        return cls(low, median, high, tuple(each))

    def over(self, other: Seconds) -> float:
        """The median over rounds of this time divided by the other model's: within a round both are disturbed alike.

        Means something for two results of one call and one length. ValueError if they do not have the same rounds.
        """
        return statistics.median(mine / its for mine, its in zip(self.each, other.each, strict=True))


@dataclass(frozen=True)
class SpeedResult:
    """One model after a prompt of ``length`` random tokens, batch size 1.

    ``prefill_s``: of one pass over the prompt, which fills a cache and scores the next token only.
    ``first_token_s``: until the likeliest next token is known to the program; it includes the prefill.
    ``decode_s_per_token``: of a pass of one token behind the prompt, and of choosing the likeliest next, averaged over
    the tokens of a round. What ``generate`` does besides (sampling, stopping) is not in it.
    ``peak_bytes``: most that such a run held beyond what was held before it, so without weights: the cache and what
    is computed with. From a run of its own, not timed, after one that warmed up. On a GPU, what PyTorch allocated
    there (not the driver's own, nor gaps between blocks). On a CPU under Linux, how far the resident memory of the
    whole process grew, by the kernel's own record, so that no short peak is missed. That includes the scratch space
    of libraries and what other threads allocate meanwhile, and not what is allocated and never written; it varies by
    megabytes from run to run, so it tells little about tiny models. What the process kept of memory freed earlier
    goes back to the kernel first, or its use would not show (glibc only). Elsewhere None: not measured.
    """

    length: int
    prefill_s: Seconds
    first_token_s: Seconds
    decode_s_per_token: Seconds
    peak_bytes: int | None
    rounds: int

    @property
    def prefill_tokens_per_s(self) -> float:
        """By the median."""
        return self.length / self.prefill_s.median

    @property
    def decode_tokens_per_s(self) -> float:
        """By the median."""
        return 1 / self.decode_s_per_token.median


@dataclass(frozen=True)
class Skipped:
    """A length that a model could not be measured at, and why."""

    length: int
    reason: str


def speed(
    models: Mapping[str, PreTrainedModel],
    lengths: Sequence[int],
    new_tokens: int = 32,
    rounds: int = 5,
    quiet: bool = False,
) -> dict[str, list[SpeedResult | Skipped]]:
    """Measure models, given by name, on the devices and in the modes they are in, at prompts of each length.

    At one length the models take turns: a round is one run of each, in random order, of a prompt and ``new_tokens``
    tokens behind it. All see the same random tokens (a mixture of experts routes text otherwise). Compilation falls
    into the runs that are not timed.

    A model that has no memory for a length, or no position for its last new token, is skipped there. On a CPU the
    room is what Linux says is available at the start: it does not know of a container's limit, beyond which it still
    kills the process.

    Raises ConfigError for numbers below 1 or no model, UnsupportedModelError for a model that returns no cache.
    """
    if not models or not lengths:
        raise ConfigError(f"{len(models)} models at {len(lengths)} lengths: give at least one of each")
    for name, number in {"lengths": min(lengths), "new_tokens": new_tokens, "rounds": rounds}.items():
        if number < 1:
            raise ConfigError(f"{name}={number}: it must be at least 1")
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    prompt = torch.randint(vocabulary, (1, max(lengths)), generator=torch.Generator().manual_seed(0))
    results: dict[str, list[SpeedResult | Skipped]] = {name: [] for name in models}
    runs = len(lengths) * len(models) * (rounds + len(_UNTIMED))
    shown: dict[str, Any] = {"disable": True} if quiet else {}  # else the user's TQDM_DISABLE counts
    with tqdm(total=runs, unit="run", leave=False, **shown) as bar, _failing_rather_than_killed(models):
        for length in lengths:
            arms = {name: _TimedModel(model, prompt[:, :length], new_tokens) for name, model in models.items()}
            shuffled = random.Random(0)
            for turn in [*_UNTIMED, *range(rounds)]:
                for name in shuffled.sample([*arms], len(arms)):
                    bar.set_description(f"{name}, {length} tokens")
                    arms[name].take(turn)
                    bar.update()
            for name, arm in arms.items():
                results[name].append(arm.result())
    return results


_UNTIMED = ("warm-up", "memory")


class _Run(NamedTuple):
    """Seconds of the prefill, until the first token, and of each token after it."""

    prefill: float
    first: float
    token: float


@dataclass
class _TimedModel:
    """A model at the prompt ``ids`` (1, n), and what its turns have found so far."""

    model: PreTrainedModel
    ids: Tensor
    new_tokens: int
    runs: list[_Run] = field(default_factory=list)
    peak: int | None = None
    skipped: Skipped | None = None

    def take(self, turn: str | int) -> None:
        """One turn: ``_UNTIMED`` or the number of a round. One that cannot be taken is the last."""
        if self.skipped:
            return
        try:
            if turn == "warm-up":
                check_length(self.model, self.ids.shape[1] + self.new_tokens)
                self._run()
            elif turn == "memory":
                self.peak = _peak_bytes(self._run, self.model.device)
            else:
                self.runs.append(self._run())
        except (DataError, MemoryError, RuntimeError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            if is_out_of_memory(error):
                reason = f"does not fit into memory: {reason}"
            elif not isinstance(error, DataError):
                raise
            self.skipped = Skipped(self.ids.shape[1], reason)
        if self.skipped:  # only here the error is gone, which holds all that its run computed
            gc.collect()
            torch.cuda.empty_cache()

    def result(self) -> SpeedResult | Skipped:
        """After all turns."""
        if self.skipped:
            return self.skipped
        prefill, first, token = (Seconds.of(each) for each in zip(*self.runs, strict=True))
        return SpeedResult(self.ids.shape[1], prefill, first, token, self.peak, len(self.runs))

    def _run(self) -> _Run:
        return _read_and_decode(self.model, self.ids.to(self.model.device), self.new_tokens)


@torch.no_grad()
def _read_and_decode(model: PreTrainedModel, ids: Tensor, new_tokens: int) -> _Run:
    """Read the prompt ``ids`` (1, n) and decode greedily behind it."""
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    _synchronise(ids.device)
    start = time.perf_counter()
    output = model(ids, use_cache=True, **only_last)
    _synchronise(ids.device)
    read = time.perf_counter()
    token = output.logits[:, -1:].argmax(-1)
    token.item()
    first = time.perf_counter()
    for _ in range(new_tokens):
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} returned no cache to decode with: give a decoder, and switch training and "
                "gradient checkpointing off"
            )
        output = model(token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    token.item()
    return _Run(read - start, first - start, (time.perf_counter() - first) / new_tokens)


def _synchronise(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    signs = ("out of memory", "can't allocate memory", "bad_alloc", "ALLOC_FAILED")  # CUDA, CPU, its libraries, cuBLAS
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


# --- memory --------------------------------------------------------------------------------------------------------

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """`SpeedResult.peak_bytes` of a run."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not _forget_peak():
        run()
        return None
    before = _bytes(_STATUS, "VmHWM")
    run()
    return _bytes(_STATUS, "VmHWM") - before


def _forget_peak() -> bool:
    """Let this process' highest resident memory, VmHWM, begin at what it really uses; whether that could be done."""
    if sys.platform != "linux":
        return False
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:  # some containers do not let it
        return False
    return True


@contextmanager
def _failing_rather_than_killed(models: Mapping[str, PreTrainedModel]) -> Iterator[None]:
    """Let allocations fail that go beyond the memory now available: Linux grants them, and kills who then writes there.

    Where a model is on a GPU nothing changes: the driver claims addresses far beyond any memory.
    """
    if sys.platform != "linux" or any(model.device.type != "cpu" for model in models.values()):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = _bytes(_STATUS, "VmSize") + _bytes(Path("/proc/meminfo"), "MemAvailable")
    resource.setrlimit(resource.RLIMIT_AS, (room if soft == resource.RLIM_INFINITY else min(soft, room), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _bytes(file: Path, key: str) -> int:
    """A field of Linux' own books, which are in kilobytes."""
    return next(1024 * int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(f"{key}:"))
