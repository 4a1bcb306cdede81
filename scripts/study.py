"""A controlled study from scratch: a small RoPE model, every arm put into it and healed with one budget, and what each
loses at 1 to 16 times the context that was trained; a model trained with T5's bias from scratch is the ceiling.

The text is the source code of Python's standard library, letter by letter in an alphabet of 38, where names that were
defined far above come again; lines of random letters that come twice are planted in it, since within two thousand
letters too little else does. A base first learns to copy, on short strings that repeat, without which so small a model
would not come to use its context; a fifth of its text goes on being such strings.
Each seed has its own base. What is finished is not repeated, arm by arm: the same command goes on.

    python scripts/study.py --out study              # two CPU cores
    python scripts/study.py --out study --size gpu   # not run yet: no GPU was at hand
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from study_models import SIZES, Size, new_model, parameters, recipe_of, say, train_base, trained
from study_text import prepare_text, tokenizer_of

if TYPE_CHECKING:
    from rpb_retrofit.comparison.healing import Healing
    from rpb_retrofit.comparison.measures import Benchmark
    from rpb_retrofit.comparison.run import Compare, Comparison, Row

ARMS = ("source", "yarn", "alibi", "none-log-n", "t5-content", "t5-kept-log")
SCRATCH = "t5-scratch"
TITLE = "Six positional choices for one small model, at up to 16 times its context"


def train_scratch(folder: Path, size: Size, seed: int) -> Row:
    """The ceiling: T5's bias from the beginning, on as many tokens as a base and its healing together."""
    import rpb_retrofit as rpb
    from rpb_retrofit.comparison.run import MEASURED, Made, Row
    from rpb_retrofit.comparison.t5 import tail_begins
    from rpb_retrofit.files.journal import Journal

    tokens, about = size.text_tokens + size.heal_tokens, "T5 bias from the beginning of training: the ceiling"

    def train() -> Row:
        model = new_model(size, seed)
        begins = tail_begins(size.context)  # as in the arms with a tail
        config = rpb.RetrofitConfig(init="normal", tail="log", seed=seed, relative_attention_max_distance=begins)
        rpb.retrofit(model, config)
        model, seconds = trained(model, folder, size, tokens, seed, f"{SCRATCH} {seed}")
        measured = benchmark_of(folder, size).measure(model, SCRATCH)
        return Row(SCRATCH, about, Made("train it", 0.0), [measured], tokens, size.base_rate, seconds)

    kinds = (Row, *MEASURED)
    with Journal.open(folder / f"scratch-{seed}", {"size": repr(size)}, "scripts/study.py", kinds, say) as journal:
        return journal(f"seed-{seed}", train)


# --- the arms --------------------------------------------------------------------------------------------------------


def benchmark_of(folder: Path, size: Size) -> Benchmark:
    """Every arm of every seed reads the same text: modules that fill the longest window."""
    from rpb_retrofit.comparison.measures import Benchmark, ComparisonPlan
    from rpb_retrofit.text.reading import read_text
    from rpb_retrofit.text.tokens import tokenise

    tokenizer = tokenizer_of(folder)
    documents = tokenise(tokenizer, read_text(str(folder / "scored.jsonl")).documents)
    plan = ComparisonPlan(
        target=size.lengths[-1],
        lengths=size.lengths,
        tokens=size.scored_tokens,
        beyond=4 * size.context,
        asked=size.lengths,
        kinds=(),
        items=8,
    )
    long = [ids[: size.lengths[-1]] for ids in documents if len(ids) >= size.lengths[-1]]
    return Benchmark.make(plan, long, None, tokenizer, {})


def compare_of(folder: Path, size: Size, seed: int, task: str) -> tuple[Compare, Healing]:
    """The arms of a seed's base, and their budget; what a task measures is in a journal of its own."""
    from rpb_retrofit.checkpoint.load import open_causal_lm
    from rpb_retrofit.comparison.healing import Healing
    from rpb_retrofit.comparison.run import MEASURED, Compare
    from rpb_retrofit.files.journal import Journal
    from rpb_retrofit.text.calibration_text import CalibrationText
    from rpb_retrofit.text.reading import read_text

    model, tokenizer = open_causal_lm(str(folder / f"base-{seed}"))
    text = CalibrationText(read_text(str(folder / "train.jsonl")), 16_384, size.context)
    place = folder / f"arms-{seed}-{task.replace(':', '-')}"
    journal = Journal.open(place, {"size": repr(size)}, "scripts/study.py", MEASURED, say)
    plan = benchmark_of(folder, size).plan
    recipe = recipe_of(size, folder, size.heal_tokens, 1.0, 1000 + seed)
    compare = Compare(model, ARMS, plan, text.windows(tokenizer, size.context), journal, say)
    return compare, Healing(recipe, size.rates, 1, tokenizer)


def measure_arm(folder: Path, size: Size, seed: int, arm: str) -> list[Row]:
    """The rows of one arm on one base: as it is, and healed."""
    compare, healing = compare_of(folder, size, seed, arm)
    with compare.journal:
        return compare.measure(arm, benchmark_of(folder, size), healing)


def time_arms(folder: Path, size: Size) -> Any:
    """All arms on the first base, in turns, in this process alone."""
    compare, _ = compare_of(folder, size, 0, "time")
    compare.plan = replace(compare.plan, timed=(size.lengths[-1],), rounds=9)
    with compare.journal:
        return compare.timed(ARMS)


# --- the whole -------------------------------------------------------------------------------------------------------


def alone(task: Any, *arguments: Any) -> Any:
    """A task in a process with one thread: so small a model gains nothing from a second."""
    import torch

    torch.set_num_threads(1)
    return task(*arguments)


def study(folder: Path, size: Size, seeds: int, workers: int) -> Comparison:
    """Everything, in so many processes: bases and ceilings first, then the arms."""
    from rpb_retrofit.comparison.run import Comparison

    if not (folder / "tokenizer").exists():
        folder.mkdir(parents=True, exist_ok=True)
        prepare_text(folder, size.copies_tokens)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        bases = [pool.submit(alone, train_base, folder, size, seed) for seed in range(seeds)]
        scratches = [pool.submit(alone, train_scratch, folder, size, seed) for seed in range(seeds)]
        for base in bases:
            base.result()
        arms = {
            arm: [pool.submit(alone, measure_arm, folder, size, seed, arm) for seed in range(seeds)] for arm in ARMS
        }
        by_arm = [[future.result() for future in each] for each in arms.values()]
        ceiling = [future.result() for future in scratches]
    rows = [over_bases(each) for arm in by_arm for each in zip(*arm, strict=True)] + [over_bases(ceiling)]
    rows.sort(key=lambda row: bool(row.tokens))
    timed = alone(time_arms, folder, size)
    return Comparison(benchmark_of(folder, size).plan, size.context, rows, timed)


def over_bases(rows: Sequence[Row]) -> Row:
    """One arm's row of every base as one: each base is a seed."""
    first = rows[0]
    made = replace(first.made, seconds=mean(row.made.seconds for row in rows))
    measured = [one for row in rows for one in row.measured]
    return replace(first, made=made, measured=measured, seconds=mean(row.seconds for row in rows))


def aims(document: Mapping[str, Any]) -> str:
    """What was aimed at, and what came of it, for the T5 arms after healing."""
    rows = {row["id"]: row for row in document["rows"]}
    healed = [row for row in document["rows"] if row["arm"] in ARMS and row["tokens"]]
    t5 = [row for row in healed if row["arm"].startswith("t5")]
    others = [row for row in healed if row not in t5]
    best, rival = (min(group, key=lambda row: row["beyond"]["mean"]) for group in (t5, others))
    gap = next(p for p in document["pairs"] if p["at"] == "target" and {p["a"], p["b"]} == {best["id"], rival["id"]})
    behind = best["beyond"]["mean"] - rival["beyond"]["mean"]
    first = "first" if behind < 0 else "not first" if gap["real"] else "tied for the first place"
    kept = ", ".join(f"{row['id']} {row['inside']['above']['mean']:+.3f}" for row in t5)
    none = rows["none-log-n"]["speed"][-1]
    times = ", ".join(
        f"{row['arm']} {row['speed'][-1]['prefill_s'] / none['prefill_s']:.2f} and "
        f"{row['speed'][-1]['decode_s'] / none['decode_s']:.2f}"
        for row in t5
    )
    lengths = [
        f"{a['length']:,} tokens: {min((r['losses'][i]['mean'], r['id']) for r in healed)[1]}"
        for i, a in enumerate(healed[0]["losses"])
    ]
    return (
        "What was aimed at, and what came of it after healing:\n\n"
        f"- Beyond four times the context a T5 arm first or tied: {first} ({best['id']} {behind:+.3f} nats a token "
        f"from {rival['id']}).\n"
        f"- Inside, at most 0.02 nats a token above the control: {kept}.\n"
        f"- At most 1.03 times the time of no positions, for a prompt and for a token: {times} (so small a model "
        "spends much of its time outside of arithmetic).\n\n"
        f"The lowest loss of whole windows: {'; '.join(lengths)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder, which is made or gone on with")
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--card", type=Path, help="a Markdown file for the result, with pictures beside it")
    options = parser.parse_args()
    from rpb_retrofit.comparison.candidates import Constraints
    from rpb_retrofit.comparison.result import ComparisonResult

    start, size = time.perf_counter(), SIZES[options.size]
    trained_on = size.copies_tokens + size.text_tokens
    comparison = study(options.out, size, options.seeds, options.workers)
    about = {
        "command": f"python scripts/study.py --out study --size {options.size} --seeds {options.seeds}",
        "source": f"a Llama of {parameters(size):,} parameters, trained on {trained_on:,} tokens",
        "mechanism": "rope",
        "text": "modules of Python's standard library with planted lines",
        "plan": {**asdict(size), "seeds": options.seeds},
        "seconds": time.perf_counter() - start,
    }
    result = ComparisonResult.of(comparison, Constraints(), about)
    (options.out / "study.json").write_text(result.as_json())
    result.write_page(options.out / "study.html")
    if options.card:
        introduction = (__doc__ or "").partition("\n\n    python")[0]
        result.write_card(options.card, TITLE, f"{aims(result.document)}\n\n{introduction}")
    print(result.headline)


if __name__ == "__main__":
    main()
