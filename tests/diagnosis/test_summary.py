"""The first screen of a diagnosis: four answers, and commands that there are."""

from __future__ import annotations

from typer.testing import CliRunner

from rpb_retrofit.cli.app import app
from rpb_retrofit.diagnosis.hypotheses import HYPOTHESES
from rpb_retrofit.diagnosis.summary import AGAIN, CAUSE, COMMANDS, LOST, NEXT, ROTARY, RUNS, summary
from tests.diagnosis.report_cases import result


def test_the_first_screen_answers_in_order() -> None:
    """Does it run right; what was lost, where; the likely cause with its share; the command to type."""
    parts = summary(result(("wrong_scale", "heads_lost")))
    assert list(parts) == [RUNS, LOST, CAUSE, NEXT]
    assert parts[RUNS] == ["No: the bias is scaled, or the content is not."]
    assert "+0.100 at 64 tokens, +0.200 at 256 tokens" in parts[LOST][0] and "above the source" in parts[LOST][0]
    assert any("repeated span" in line for line in parts[LOST])
    assert parts[CAUSE][0] == "The bias is scaled, or the content is not (60% of what was lost)."
    assert parts[NEXT] == ["rpb retrofit org/source org/retrofit-again --calibration TEXT"]
    fine = summary(result())
    assert fine[RUNS][0].startswith("Yes") and fine[CAUSE] == ["None was found."]
    assert fine[NEXT] == ["rpb finetune org/retrofit org/retrofit-healed --data TEXT"]
    told = result()
    next(h for h in told["hypotheses"] if h["name"] == "precision")["finding"]["failed"] = True
    failed = summary(told)
    assert failed[NEXT] == ["rpb diagnose org/retrofit --source org/source --only precision"]


def test_what_explains_little_is_not_the_cause() -> None:
    told = result(("heads_lost",))
    for hypothesis in told["hypotheses"]:
        hypothesis |= {"explains": False, "share": 0.16 if hypothesis["confirmed"] else None}
    (parts,) = summary(told)[CAUSE]
    assert parts.startswith("No single one explains 25% of what was lost. Contributing: heads") and "(16% of" in parts


def test_every_command_is_one_that_there_is() -> None:
    for name, command in [*COMMANDS.items(), ("again", AGAIN + ROTARY)]:
        words = command.format(source="S", retrofit="R").split()
        known = CliRunner().invoke(app, [words[1], "--help"]).output
        assert name == "again" or name in {h.name for h in HYPOTHESES}
        assert all(word in known for word in words if word.startswith("--")), command
