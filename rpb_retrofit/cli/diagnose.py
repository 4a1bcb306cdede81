"""``rpb diagnose RETROFIT``."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rpb_retrofit.cli.evaluate import parse_lengths
from rpb_retrofit.cli.options import Bos, Json, Seed, check_bos, count, unused
from rpb_retrofit.cli.outputs import check_outputs, check_scratch, command_line, say, write_json
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import one_line

if TYPE_CHECKING:
    from rpb_retrofit.diagnosis.run import Diagnosis


def command(
    given: typer.Context,
    retrofit: Annotated[str, typer.Argument(help="The retrofit that is examined: a folder or a hub id.")],
    source: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model before the retrofit. Default: what the retrofit's config names."),
    ] = None,
    untrained: Annotated[str | None, typer.Option(metavar="MODEL", help="The retrofit before it was trained.")] = None,
    control: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The source after the same training (rpb finetune --control).")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text, JSONL or Parquet (column 'text'). Default: Python's help.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Context lengths, separated by commas.")] = "128,512,2048",
    tokens: Annotated[str, typer.Option(metavar="N", help="Tokens of text, the same ones at every length.")] = "4096",
    probed: Annotated[str, typer.Option(metavar="N", help="Tokens on which a suspected cause is undone.")] = "1024",
    items: Annotated[int, typer.Option(help="Questions of each kind, length and depth; 0 for none.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds of timing; 0 for none.")] = 1,
    bos: Bos = "auto",
    only: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Test these hypotheses only, and draw no report.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where report.html and report.json go.")] = Path(
        "diagnosis"
    ),
    fail_on_regression: Annotated[
        float | None,
        typer.Option(
            metavar="NATS",
            help="Exit with status 1 where the retrofit loses more, does not run as it should, or that is not known.",
        ),
    ] = None,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """What regressed after a retrofit, where, and why."""
    from rpb_retrofit.diagnosis.hypotheses import HYPOTHESES
    from rpb_retrofit.diagnosis.measurements import MEASURED, DiagnosisPlan, Measurements
    from rpb_retrofit.diagnosis.opening import identity, known_source, open_arms, trained_pairs
    from rpb_retrofit.diagnosis.report import write_report
    from rpb_retrofit.diagnosis.run import diagnose
    from rpb_retrofit.evaluation.nll import check_ids
    from rpb_retrofit.files.folder import check_absent, whole_folder
    from rpb_retrofit.files.journal import Journal
    from rpb_retrofit.text import bos_policy, read_text, tokenise

    wanted = parse_lengths(lengths)
    check_bos(bos)
    scored, undone = count("--tokens", tokens, least=2), count("--probed", probed, least=2)
    for option, value in (("items", items), ("rounds", rounds)):
        if value < 0:
            raise ConfigError(f"--{option} {value}: at least 0")
    if fail_on_regression is not None and not 0 <= fail_on_regression < math.inf:
        raise ConfigError(f"--fail-on-regression {fail_on_regression}: a number of nats a token, 0 or more")
    if fail_on_regression is not None and only is not None:
        raise ConfigError(
            f"--fail-on-regression {fail_on_regression} and --only {only} contradict each other: no loss would be "
            "measured; leave one out"
        )
    chosen = {hypothesis.name: hypothesis for hypothesis in HYPOTHESES}
    if only is not None:
        for name in (names := [name.strip() for name in only.split(",")]):
            if name not in chosen:
                raise ConfigError(f"--only {name}: no such hypothesis; choose from {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in names}
        unused(given, ["out"], "--only draws no report")
    else:
        check_absent(out)
    named = source or known_source(retrofit)
    check_outputs({"--json": json}, [retrofit, named, untrained, control, data], folder=out)
    check_scratch()
    text = read_text(data)
    roles = {"source": named, "untrained": untrained, "control": control}
    arms_by_name = {"retrofit": retrofit, **{role: name for role, name in roles.items() if name is not None}}
    arms, tokenizer = open_arms(arms_by_name, text.documents[0])
    documents = tokenise(tokenizer, text.documents)
    for _, model in arms:
        check_ids(model, documents)
    plan = DiagnosisPlan(tuple(wanted), scored, undone, items, rounds, seed)
    journal = Journal()
    if only is None:
        wanted_of = identity(arms_by_name, text.checksum, {**asdict(plan), "bos": bos})
        journal = Journal.open(out.with_name(f"{out.name}.run"), wanted_of, "rpb diagnose", MEASURED, say)
    with journal:
        measurements = Measurements(
            arms,
            documents,
            bos_policy(tokenizer, bos),
            plan,
            tokenizer,
            trained_pairs(retrofit),
            journal,
        )
        found = diagnose(measurements, text.name, say, list(chosen.values()), figures=only is None)
        _print(found)
        result = {"command": command_line(), **found.to_dict()}
        if only is None:
            with whole_folder(out) as folder:
                write_report(found.to_dict(), result["command"], folder / "report.html")
                write_json(folder / "report.json", result)
            journal.remove()
            print(f"\nreport: {one_line(out / 'report.html')}")
    if json is not None:
        write_json(json, result)
    if fail_on_regression is not None and _regressed(found, fail_on_regression):
        raise typer.Exit(1)


def _regressed(found: Diagnosis, tolerance: float) -> bool:
    """Whether CI is to fail, and why, in words."""
    from rpb_retrofit.diagnosis.finding import Kind

    worse = found.regressions(tolerance)
    for cost in worse:
        print(f"regression: {cost['mean']:+.3f} nats a token at {cost['length']} tokens, more than {tolerance:g}")
    wrong = [cause for cause in found.causes if cause.kind is Kind.RUNNING]
    for cause in wrong:
        print(f"regression: {cause.cause}")
    unknown = found.unmeasured()
    for what, why in unknown.items():
        print(one_line(f"not measured: {what}: {why}"))
    for cost in found.blind(tolerance):
        print(
            f"note: at {cost['length']} tokens this sample could see differences of {cost['detectable']:.3f} nats "
            f"and more, not {tolerance:g}: give more --tokens"
        )
    return bool(worse or wrong or unknown)


def _print(found: Diagnosis) -> None:
    """The verdict and the confirmed hypotheses, as a table for the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(f"\n{one_line(found.headline)}\n", style="bold"))
    if found.figures:
        for question, answers in found.to_dict()["summary"].items():
            console.print(Text(question, style="bold"))
            for answer in answers:
                console.print(Text(f"  {one_line(answer)}"))
        console.print()
    for name, why in found.failed.items():
        console.print(Text(one_line(f"measuring {name} failed, so this says nothing of it: {why}")))
    table = Table(show_lines=True)
    for column in ("", "hypothesis", "verdict", "evidence", "remedy"):
        table.add_column(column)
    order = {outcome.name: number for number, outcome in enumerate(found.causes, 1)}
    for outcome in [*found.causes, *(o for o in found.outcomes if not o.confirmed)]:
        finding = outcome.finding
        gain = "" if finding.gain is None else f" (undone: {-finding.gain:+.3f} nats a token)"
        row: list[Any] = [str(order.get(outcome.name, "")), outcome.cause, str(finding.verdict)]
        table.add_row(*(Text(one_line(cell)) for cell in [*row, finding.because + gain, finding.remedy]))
    console.print(table)
    losses = found.figures.get("loss") or {"costs": []}
    for cost in losses["costs"]:
        sure = "" if cost["real"] else f"; no difference found, of {cost['detectable']:.3f} or more"
        console.print(
            Text(
                f"{cost['arm']} above {cost['above']} at {cost['length']} tokens: {cost['mean']:+.3f} "
                f"({cost['low']:+.3f} to {cost['high']:+.3f}) nats a token{sure}"
            )
        )
    for role, what in found.missing.items():
        console.print(Text(one_line(f"without {role}, not told: {what}")))
    for what, reason in found.skipped.items():
        console.print(Text(one_line(f"skipped: {what}: {reason}")))
