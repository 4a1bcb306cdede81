"""README keeps its word: its code and its commands run, its figures stand in a card, its links lead somewhere."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from rpb_retrofit.runtime.families import FAMILIES
from tests.support.command import rpb_command
from tests.support.training_cases import PROSE, write_source

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARDS = sorted((ROOT / "model_cards").glob("*.md"))
FOLDERS = sorted((ROOT / "rpb_retrofit").glob("*/README.md"))

SMALLER = {
    "finetune": "--set stages.0.tokens=1024 --set stages.1.tokens=1024",
    "evaluate": "--tokens 4096",
    "diagnose": "--lengths 32,128 --tokens 512 --probed 256 --items 0 --rounds 0",
    "compare": "--target-length 512 --arms yarn,t5 --tokens 1024 --calibration-tokens 512 --items 0 --rounds 0",
}
"""What a command is given besides, so that it ends in seconds; the last one of an option counts."""


def fences(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands() -> list[str]:
    """Every command line of README that begins with ``rpb``, in its order: in a block, or in a table."""
    lines = re.findall(r"^(?:\| `)?(rpb [^`\n]+?)(?:`.*|\s+#.*)?$", README, re.M)
    return [line for line in lines if not line.startswith("rpb demo")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what README takes for granted: ``path/to/model`` and ``my.txt``."""
    (tmp_path / "path" / "to").mkdir(parents=True)
    write_source(tmp_path / "path" / "to" / "model")
    paragraphs = [" ".join(PROSE[start : start + 300].split()) for start in range(0, 24_000, 300)]
    (tmp_path / "my.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_blocks_run(folder: Path) -> None:
    blocks = fences("python")
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (folder / "path" / "to" / "retrofit" / "config.json").exists()


def test_the_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [command.split()[1] for command in commands()]
    assert set(names) >= {"retrofit", "finetune", "evaluate", "diagnose", "compare", "card", "explain"}
    for name, command in zip(names, commands(), strict=True):
        AcceleratorState._reset_state(reset_partial_state=True)  # finetune sets it for the life of a process
        arguments = shlex.split(command)[1:] + SMALLER.get(name, "").split()
        assert rpb_command(monkeypatch, *arguments) == 0, command
    for made in ("path/to/out/config.json", "path/to/healed/README.md", "diagnosis/report.html"):
        assert (folder / made).exists()


def test_it_is_read_in_three_minutes() -> None:
    assert len(README.splitlines()) <= 130


def test_the_families_are_those_of_the_code() -> None:
    section = README[README.index("## What is supported") : README.index("## Read on")]
    cells = " ".join(re.findall(r"^\| (?!mechanism)[^|]+ \| ([^|]+) \|$", section, re.M))
    names = re.findall(r"[a-z]\w+(?: \(text\))?", cells)
    assert {name.replace(" (text)", "_text") for name in names} == set(FAMILIES)


@pytest.mark.parametrize("file", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *CARDS, *FOLDERS], ids=lambda p: p.name)
def test_links_lead_somewhere(file: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


def test_the_picture_shows_what_the_cards_say() -> None:
    """`python scripts/plot_costs.py` was run after its cards changed last."""
    script = runpy.run_path(str(ROOT / "scripts" / "plot_costs.py"))
    picture = (ROOT / "model_cards" / "costs.svg").read_text(encoding="utf-8")
    drawn = re.findall(r">([+-][\d.]+)<", picture)
    assert drawn == [f"{cost:+.2f}" for cost in script["costs"]().values()]
    assert set(map("{:,}".format, script["far_losses"]()[0])) <= set(re.findall(r">([\d,]+)<", picture))


# --- figures ----------------------------------------------------------------------------------------------------------

VERSION = re.compile(r"(?:Python|Transformers|needs|from|since|UMT5:)\s+\d+\.\d+")
"""A number that is no figure: a release."""

NUMBER = r"[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
UNIT = r"(?:\s?(?:%|[KMG]i?B\b|M\b|nats\b|times\b|min(?:utes)?\b|hours\b|s\b|model\sfamilies\b))?"
FIGURE = re.compile(rf"(?<![\w.,+-]){NUMBER}(?:\s(?:to|of)\s{NUMBER})?{UNIT}")
"""A number, range or ``N of M`` that stands by itself (not that of SmolLM2 or float64), with its sign and its unit."""


def statements(text: str) -> Iterator[str]:
    """What a page says, piece by piece: the comments of its code, and its table rows, items and paragraphs without
    code, links' targets and headings."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S):
        yield from re.findall(r" # (.+)$", block, re.M)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)|^#.*$", " ", text, flags=re.M)
    for piece in re.split(r"\n\s*\n|\n(?=\s*[-*|] ?)", text):
        yield " ".join(piece.split())


def figures(statement: str) -> set[str]:
    """The figures of a piece of a page."""
    return {" ".join(match.split()) for match in FIGURE.findall(VERSION.sub("", statement))}


KNOWN = [figures(piece) for card in CARDS for piece in statements(card.read_text(encoding="utf-8"))]
"""The figures of every row, item and paragraph of every card."""


def stands_in_a_card(stated: set[str]) -> bool:
    """Whether one row, item or paragraph of a card holds all of these figures."""
    return any(stated <= known for known in KNOWN)


STATEMENTS = [piece for piece in statements(README) if figures(piece)]


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda piece: piece[:40])
def test_figures_stand_in_a_card(statement: str) -> None:
    stated = figures(statement)
    assert stands_in_a_card(stated), f"no row or paragraph of a card holds all of {sorted(stated)}"


def test_an_altered_figure_is_noticed() -> None:
    """The test above can fail: hardly any figure could be another one by a digit."""
    unnoticed, tried = [], 0
    for stated in map(figures, STATEMENTS):
        for figure in stated:
            last = max(i for i, letter in enumerate(figure) if letter.isdigit())
            altered = f"{figure[:last]}{(int(figure[last]) + 1) % 10}{figure[last + 1 :]}"
            tried += 1
            if stands_in_a_card(stated - {figure} | {altered}):
                unnoticed.append(figure)
    assert tried > 30
    assert len(unnoticed) <= tried / 10, unnoticed


def test_there_are_figures() -> None:
    stated = set().union(*map(figures, STATEMENTS))
    assert {"+0.36", "2 min", "59 s", "77 of 77", "362 MB", "74 to 81%", "26 model families", "5 minutes"} <= stated
