"""Speed by prompt length: what time is put where, turns, memory, and lengths that a model cannot take."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import rpb_retrofit as rpb
from rpb_retrofit.errors import ConfigError, UnsupportedModelError
from rpb_retrofit.evaluation import speed as module
from rpb_retrofit.evaluation.speed import Seconds, Skipped, SpeedResult, speed
from tests.families.cases import CASES
from tests.support.tiny_models import build, retrofitted

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps these books")


class Watched(LlamaForCausalLM):
    """A model that tells of every pass, by its number of tokens, before it takes it."""

    def __init__(self, watch: Callable[[int], object]) -> None:
        torch.manual_seed(0)
        super().__init__(LlamaConfig(**CONFIG))
        self.watch = watch
        self.eval()

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        self.watch(input_ids.shape[1])
        return super().forward(input_ids, **options)


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """One thread, as tiny models only lose by more where others use the cores; and the process' limits stay."""
    threads, limits = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_AS)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def measured(results: list[SpeedResult | Skipped]) -> list[SpeedResult]:
    assert all(isinstance(result, SpeedResult) for result in results), results
    return [result for result in results if isinstance(result, SpeedResult)]


def test_a_source_and_its_retrofit() -> None:
    torch.manual_seed(0)
    source, retrofit = (LlamaForCausalLM(LlamaConfig(**CONFIG)).eval() for _ in range(2))
    rpb.retrofit(retrofit, rpb.RetrofitConfig(init="normal"))
    results = speed({"source": source, "retrofit": retrofit}, [64, 16], new_tokens=4, rounds=3)
    assert list(results) == ["source", "retrofit"]
    for timings in map(measured, results.values()):
        assert [result.length for result in timings] == [64, 16]
        for result in timings:
            assert result.rounds == 3
            for seconds in (result.prefill_s, result.first_token_s, result.decode_s_per_token):
                assert 0 < seconds.low <= seconds.median <= seconds.high
                assert len(seconds.each) == 3 and statistics.median(seconds.each) == seconds.median
            assert all(a < b for a, b in zip(result.prefill_s.each, result.first_token_s.each, strict=True))
            assert result.prefill_tokens_per_s == pytest.approx(result.length / result.prefill_s.median)
            assert result.decode_tokens_per_s == pytest.approx(1 / result.decode_s_per_token.median)
            assert (result.peak_bytes is not None) == (sys.platform == "linux")


def test_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_forget_peak", lambda: False)  # memory is not looked at, and collecting it takes long
    for case in CASES:
        if case.kind == "causal":
            models = {"source": build(case), "retrofit": retrofitted(case)}
            results = speed(models, [8], new_tokens=1, rounds=1, quiet=True)
            assert all(map(measured, results.values())), str(case)


def test_time_is_put_where_it_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that take 10 ms a token of the prompt and 500 ms (twice that) a token behind it, on a clock of the test.

    Every second round is disturbed, and takes three times as long, for all alike.
    """
    clock, passes = [0.0], []

    def watch(name: str, factor: float, tokens: int) -> None:
        passes.append((name, tokens))
        disturbed = 3 if len([own for own, count in passes if own == name and count > 1]) % 2 else 1
        clock[0] += factor * disturbed * (0.01 * tokens if tokens > 1 else 0.5)

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    models = {name: Watched(lambda n, a=(name, f): watch(*a, n)) for name, f in (("fast", 1.0), ("slow", 2.0))}
    results = speed(models, [30, 50], new_tokens=3, rounds=4)
    for number, length in enumerate((30, 50)):
        fast, slow = (measured(results[name])[number] for name in ("fast", "slow"))
        for factor, result in ((1, fast), (2, slow)):
            prefill = [factor * disturbed * 0.01 * length for disturbed in (3, 1, 3, 1)]
            assert result.prefill_s.each == pytest.approx(prefill)
            assert result.first_token_s.each == pytest.approx(prefill)
            assert result.decode_s_per_token.each == pytest.approx([1.5 * factor, 0.5 * factor] * 2)
            assert result.prefill_s.median == pytest.approx(factor * 2 * 0.01 * length)
        assert slow.prefill_s.over(fast.prefill_s) == pytest.approx(2)
        assert slow.decode_s_per_token.over(fast.decode_s_per_token) == pytest.approx(2)

    runs = [passes[i : i + 4] for i in range(0, len(passes), 4)]
    assert len(runs) == 2 * 2 * (4 + 2), "two lengths, two models, four rounds after two that are not timed"
    for number, one in enumerate(runs):
        length = 30 if number < len(runs) / 2 else 50
        assert one == [(one[0][0], length), *[(one[0][0], 1)] * 3]
    turns = ["".join(run[0][0][0] for run in runs[i : i + 2]) for i in range(0, len(runs), 2)]
    assert set(turns) == {"fs", "sf"}, "every round has each model once, in no fixed order"


def test_seconds() -> None:
    assert Seconds.of([3.0]) == Seconds(3.0, 3.0, 3.0, (3.0,))
    assert Seconds.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Seconds(2.0, 3.0, 4.0, (5.0, 1.0, 2.0, 4.0, 3.0))
    assert Seconds.of([2.0, 9.0, 4.0]).over(Seconds.of([1.0, 3.0, 4.0])) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        Seconds.of([1.0, 2.0]).over(Seconds.of([1.0]))


@pytest.mark.parametrize(
    ("error", "message", "passes_before"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore"),
            "CUDA out of memory. Tried to",
            0,
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "can't allocate memory: you tried", 0),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "CUBLAS_STATUS_ALLOC_FAILED", 0),
        (RuntimeError("std::bad_alloc"), "std::bad_alloc", 0),
        (MemoryError(), "MemoryError", 3),
    ],
    ids=["cuda", "cpu", "cublas", "library", "in a round"],
)
def test_a_length_that_does_not_fit(error: Exception, message: str, passes_before: int) -> None:
    seen: list[int] = []

    def watch(tokens: int) -> None:
        seen.append(tokens)
        if tokens >= 64 and seen.count(tokens) > passes_before:
            raise error

    models = {"large": Watched(watch), "small": Watched(lambda tokens: None)}
    results = speed(models, [16, 64, 32], new_tokens=2, rounds=2, quiet=True)
    short, skipped, after = results["large"]
    assert isinstance(skipped, Skipped) and skipped.length == 64
    assert skipped.reason.startswith("does not fit into memory: ") and message in skipped.reason
    assert "\n" not in skipped.reason
    assert [result.length for result in measured([short, after])] == [16, 32]
    assert [result.length for result in measured(results["small"])] == [16, 64, 32]
    assert seen.count(64) == passes_before + 1, "not tried again"


def test_another_error_is_an_error() -> None:
    def watch(tokens: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        speed({"broken": Watched(watch)}, [16], quiet=True)


def test_positions_that_a_source_does_not_have() -> None:
    gpt2 = next(case for case in CASES if str(case) == "gpt2")
    results = speed({"source": build(gpt2), "retrofit": retrofitted(gpt2)}, [32, 64], new_tokens=4, rounds=1)
    short, skipped = results["source"]
    assert isinstance(short, SpeedResult)
    assert isinstance(skipped, Skipped) and "has a table of 64 positions and cannot take it" in skipped.reason
    assert [result.length for result in measured(results["retrofit"])] == [32, 64]


@linux
@pytest.mark.parametrize("pieces", [1, 4096])
def test_peak_memory_of_a_cpu(pieces: int) -> None:
    """A peak of 128 MiB is seen however short it was, though a run before had it too, and then forgotten."""
    kept = []

    def watch(tokens: int) -> None:
        if tokens == 32:
            held = [torch.ones(128 * MIB // pieces, dtype=torch.uint8) for _ in range(pieces)]
            kept.append(torch.ones(2000))  # behind the pieces, so that the process keeps the room they leave
            held.clear()

    small, large, again = measured(speed({"model": Watched(watch)}, [16, 32, 24], new_tokens=1, rounds=1)["model"])
    assert small.peak_bytes is not None and large.peak_bytes is not None and again.peak_bytes is not None
    assert 0 <= small.peak_bytes < 32 * MIB
    assert 120 * MIB < large.peak_bytes < 160 * MIB
    assert 0 <= again.peak_bytes < 32 * MIB


def test_peak_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    for name, answer in (("reset_peak_memory_stats", None), ("memory_allocated", 100), ("max_memory_allocated", 350)):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, answer=answer: (told.append(name), answer)[1])
    assert module._peak_bytes(lambda: told.append("run"), torch.device("cuda")) == 250
    assert told == ["reset_peak_memory_stats", "memory_allocated", "run", "max_memory_allocated"]


def test_memory_that_cannot_be_measured_is_not_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_CLEAR", tmp_path / "nowhere" / "clear_refs")
    (result,) = measured(speed({"model": Watched(lambda tokens: None)}, [16], new_tokens=1, rounds=1)["model"])
    assert result.peak_bytes is None


@linux
def test_more_than_the_machine_has_is_an_error_and_no_kill() -> None:
    """Memory that is granted one piece after another, as attention of many layers or heads takes it."""

    def watch(tokens: int) -> None:
        if tokens == 32:
            held = [torch.empty(1024 * MIB, dtype=torch.uint8) for _ in range(8192)]  # never written, so never there
            assert not held, "all of 8 TB were granted"

    results = speed({"greedy": Watched(watch), "modest": Watched(lambda tokens: None)}, [32, 16], rounds=1)
    skipped, short = results["greedy"]
    assert isinstance(skipped, Skipped) and "can't allocate memory" in skipped.reason
    assert isinstance(short, SpeedResult)
    assert len(measured(results["modest"])) == 2


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"models": {}}, "0 models at 1 lengths: give at least one of each"),
        ({"lengths": []}, "1 models at 0 lengths: give at least one of each"),
        ({"lengths": [16, 0]}, "lengths=0: it must be at least 1"),
        ({"new_tokens": 0}, "new_tokens=0: it must be at least 1"),
        ({"rounds": -1}, "rounds=-1: it must be at least 1"),
    ],
)
def test_wrong_input(changes: dict[str, Any], answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        speed(**{"models": {"model": Watched(lambda tokens: None)}, "lengths": [16], **changes})


def test_a_model_without_a_cache() -> None:
    model = Watched(lambda tokens: None).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="Watched returned no cache to decode with"):
        speed({"model": model}, [16], new_tokens=1, rounds=1, quiet=True)
