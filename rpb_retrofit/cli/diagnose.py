"""``rpb diagnose RETROFIT``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpb_retrofit.cli.evaluate import parse_lengths
from rpb_retrofit.cli.options import Bos, Json, Seed, count, unused
from rpb_retrofit.cli.outputs import check_outputs, check_scratch, command_line, say, write_json
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rpb_retrofit.diagnosis.result import Diagnosis

Retrofit = Annotated[str, typer.Argument(help="The retrofit that is examined: a folder or a hub id.")]
Source = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="The model before the retrofit. Default: what the retrofit's config names."),
]
Untrained = Annotated[str | None, typer.Option(metavar="MODEL", help="The retrofit before it was trained.")]
Control = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The source after the same training (rpb finetune --control).")
]
Data = Annotated[
    str | None, typer.Option(metavar="FILE", help="Text, JSONL or Parquet (column 'text'). Default: Python's help.")
]
Lengths = Annotated[str, typer.Option(help="Context lengths, separated by commas.")]
Tokens = Annotated[str, typer.Option(metavar="N", help="Tokens of text, the same ones at every length.")]
Probed = Annotated[str, typer.Option(metavar="N", help="Tokens on which a suspected cause is undone.")]
Items = Annotated[int, typer.Option(help="Questions of each kind, length and depth; 0 for none.")]
Rounds = Annotated[int, typer.Option(help="Rounds of timing; 0 for none.")]
Only = Annotated[str | None, typer.Option(metavar="NAMES", help="Test these hypotheses only, and draw no report.")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where report.html and report.json go.")]
FailOnRegression = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Exit with status 1 where the retrofit loses more, does not run as it should, or that is not known.",
    ),
]


def command(
    given: typer.Context,
    retrofit: Retrofit,
    source: Source = None,
    untrained: Untrained = None,
    control: Control = None,
    data: Data = None,
    lengths: Lengths = "128,512,2048",
    tokens: Tokens = "4096",
    probed: Probed = "1024",
    items: Items = 2,
    rounds: Rounds = 1,
    bos: Bos = "auto",
    only: Only = None,
    out: Out = Path("diagnosis"),
    fail_on_regression: FailOnRegression = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """What regressed after a retrofit, where, and why."""
    from rpb_retrofit.diagnosis.diagnose import diagnose
    from rpb_retrofit.diagnosis.hypotheses import hypotheses_named
    from rpb_retrofit.diagnosis.open_models import known_source

    settings: dict[str, Any] = {
        **{"lengths": parse_lengths(lengths), "tokens": count("--tokens", tokens, least=2)},
        **{"probed": count("--probed", probed, least=2), "items": items, "rounds": rounds, "bos": bos, "seed": seed},
    }
    check_tolerance(fail_on_regression, only)
    names = [name.strip() for name in only.split(",")] if only is not None else []
    hypotheses_named(names)
    if only is not None:
        unused(given, ["out"], "--only draws no report")
    models: dict[str, Any] = {"source": source or known_source(retrofit), "untrained": untrained, "control": control}
    check_outputs({"--json": json}, [retrofit, *models.values(), data], folder=out)
    check_scratch()
    folder = None if names else out
    diagnosis = diagnose(
        retrofit, **models, data=data, **settings, only=names, out=folder, say=say, command=command_line()
    )
    print_diagnosis(diagnosis)
    if folder is not None:
        print(f"\nreport: {one_line(folder / 'report.html')}")
    if json is not None:
        write_json(json, {"command": command_line(), **diagnosis.to_dict()})
    if fail_on_regression is not None and regressed(diagnosis, fail_on_regression):
        raise typer.Exit(1)


def check_tolerance(nats: float | None, only: str | None) -> None:
    """ConfigError for a --fail-on-regression that is no loss, or beside --only, which measures none."""
    if nats is not None and not 0 <= nats < math.inf:
        raise ConfigError(f"--fail-on-regression {nats}: a number of nats a token, 0 or more")
    if nats is not None and only is not None:
        raise ConfigError(
            f"--fail-on-regression {nats} and --only {only} contradict each other: no loss would be measured; leave "
            "one out"
        )


def regressed(diagnosis: Diagnosis, tolerance: float) -> bool:
    """Whether CI is to fail, and why, in words."""
    from rpb_retrofit.diagnosis.finding import CauseKind

    worse = diagnosis.regressions(tolerance)
    for cost in worse:
        print(f"regression: {cost['mean']:+.3f} nats a token at {cost['length']} tokens, more than {tolerance:g}")
    wrong = [cause for cause in diagnosis.causes if cause.kind is CauseKind.RUNNING]
    for cause in wrong:
        print(f"regression: {cause.cause}")
    unknown = diagnosis.unmeasured()
    for what, why in unknown.items():
        print(one_line(f"not measured: {what}: {why}"))
    for cost in diagnosis.blind(tolerance):
        print(
            f"note: at {cost['length']} tokens this sample could see differences of {cost['detectable']:.3f} nats "
            f"and more, not {tolerance:g}: give more --tokens"
        )
    return bool(worse or wrong or unknown)


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """The verdict, what was lost, and the hypotheses as a table, for the terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"\n{one_line(diagnosis.headline)}\n", style="bold"))
    if diagnosis.figures:
        for question, answers in diagnosis.summary.items():
            console.print(Text(question, style="bold"))
            for answer in answers:
                console.print(Text(f"  {one_line(answer)}"))
        console.print()
    for name, why in diagnosis.failed.items():
        console.print(Text(one_line(f"measuring {name} failed, so this says nothing of it: {why}")))
    console.print(_hypotheses(diagnosis))
    _print_costs(diagnosis, console)
    for role, what in diagnosis.missing.items():
        console.print(Text(one_line(f"without {role}, not told: {what}")))
    for what, reason in diagnosis.skipped.items():
        console.print(Text(one_line(f"skipped: {what}: {reason}")))


def _hypotheses(diagnosis: Diagnosis) -> Table:
    """All of them, the causes first, numbered."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for column in ("", "hypothesis", "verdict", "evidence", "remedy"):
        table.add_column(column)
    order = {outcome.name: number for number, outcome in enumerate(diagnosis.causes, 1)}
    for outcome in [*diagnosis.causes, *(o for o in diagnosis.outcomes if not o.confirmed)]:
        finding = outcome.finding
        gain = "" if finding.gain is None else f" (undone: {-finding.gain:+.3f} nats a token)"
        row = [str(order.get(outcome.name, "")), outcome.cause, str(finding.verdict)]
        table.add_row(*(Text(one_line(cell)) for cell in [*row, finding.because + gain, finding.remedy]))
    return table


def _print_costs(diagnosis: Diagnosis, console: Console) -> None:
    from rich.text import Text

    for cost in (diagnosis.figures.get("loss") or {"costs": []})["costs"]:
        sure = "" if cost["real"] else f"; no difference found, of {cost['detectable']:.3f} or more"
        console.print(
            Text(
                f"{cost['arm']} above {cost['above']} at {cost['length']} tokens: {cost['mean']:+.3f} "
                f"({cost['low']:+.3f} to {cost['high']:+.3f}) nats a token{sure}"
            )
        )
