"""Tries a retrofit of every family under the last patch of each minor release of Transformers, and writes a table.

    python scripts/check_lock.py --folder lock --card model_cards/releases.md
    python scripts/check_lock.py --folder lock --releases 4.57.6,5.3.0

Each release gets an environment of its own in FOLDER, beside which it sees the packages of the environment that runs
this script (PyTorch is not installed again). Tiny retrofits of all families in tests/families/cases.py are loaded there
as whoever does not know what they are would load them, with what may be given by hand, and with
``trust_remote_code=True``. Needs a package index; not part of the tests.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OLDEST = (4, 50)
REMEDY = ("rpb_retrofit.load(path)", "trust_remote_code=True")


def last_patches() -> list[str]:
    """The last patch of each minor release since `OLDEST`, oldest first, as the package index lists them."""
    command = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    last: dict[tuple[int, ...], tuple[int, ...]] = {}
    for version in re.findall(r"\b\d+\.\d+\.\d+\b", listed.split("Available versions:")[1].splitlines()[0]):
        parts = tuple(map(int, version.split(".")))
        if parts >= OLDEST:
            last[parts[:2]] = max(last.get(parts[:2], parts), parts)
    return [".".join(map(str, parts)) for parts in sorted(last.values())]


def make_retrofits(folder: Path) -> None:
    """A tiny retrofit of every case, and what it computes, in folders of their own."""
    import torch
    from safetensors.torch import save_file

    from tests.families.cases import CASES
    from tests.support.tiny_models import AUTO, inputs_of, retrofitted, tokens

    if (folder / "cases.json").exists():
        return
    rows = []
    for case in CASES:
        model, inputs = retrofitted(case), inputs_of(case, tokens())
        model.save_pretrained(folder / str(case))
        with torch.no_grad():
            logits = model(**inputs).logits.contiguous()
        save_file({**inputs, "logits": logits}, folder / str(case) / "expected.tensors")
        row = {"name": str(case), "model_type": case.family, "auto": AUTO[case.kind], "concrete": case.model}
        rows.append({**row, "mechanism": model.config.rpb_retrofit["mechanism"]})
    (folder / "cases.json").write_text(json.dumps(rows, indent=2))


def environment(folder: Path, release: str) -> Path:
    """The Python of an environment with that release, made if it is not there."""
    place = folder / release
    python, ready = place / "bin" / "python", place / "ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)], check=True)
        packages = next(place.glob("lib/python*/site-packages"))
        (packages / "base.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, f"transformers=={release}"], check=True, stderr=subprocess.DEVNULL)
        ready.touch()
    return python


def probe(python: Path, retrofits: Path, scratch: Path) -> dict[str, Any]:
    """What `lock_probe` found, by case."""
    scratch.mkdir(parents=True, exist_ok=True)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script, results = Path(__file__).with_name("lock_probe.py"), scratch / "found.json"
    ran = subprocess.run([python, script, retrofits, results], capture_output=True, text=True, env=variables)
    if ran.returncode:
        raise SystemExit(f"{python}: {ran.stderr}")
    return json.loads(results.read_text())


GIVEN = {
    "plain load": ("nothing",),
    "one argument by hand": ("attention", "experts"),
    "both by hand": ("both",),
}


def plain_cell(results: dict[str, Any], given: tuple[str, ...]) -> str:
    """How many plain loads were refused, and how many errors said what to do, where not all did."""
    errors = [
        error
        for case in results.values()
        for how in given
        if case["known"] and how in case["plain"]
        for error in case["plain"][how].values()
    ]
    if not errors:
        return "no such arguments"
    refused = [error for error in errors if error is not None]
    told = sum(all(word in error for word in REMEDY) for error in refused)
    cell = f"{len(refused)} of {len(errors)}"
    if len(refused) < len(errors):
        cell = f"**{cell}**"
    return cell if told == len(refused) else f"{cell} ({told} say what to do)"


def remote_cell(results: dict[str, Any]) -> str:
    """How many loads with the checkpoint's own code gave the retrofit's logits, or said which release they need."""
    known = {name: case["remote"] for name, case in results.items() if case["known"]}
    right = {name for name, load in known.items() if load["difference"] is not None and load["difference"] < 1e-5}
    told = {name for name, load in known.items() if "needs Transformers" in (load["error"] or "")}
    parts = [f"{len(right)} of {len(known)} right"] if right else []
    parts += [f"{len(told)} of {len(known)} say which release they need"] if told else []
    for name in sorted(set(known) - right - told):
        error = known[name]["error"]
        parts.append(f"{name}: {error.split(':')[0]}" if error else f"**{name} is wrong**")
    return ", ".join(parts)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a release."""
    head = ["Transformers", "models known", *GIVEN, "`trust_remote_code=True`"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for release, cases in results.items():
        known = f"{sum(case['known'] for case in cases.values())} of {len(cases)}"
        cells = [release, known, *(plain_cell(cases, given) for given in GIVEN.values()), remote_cell(cases)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def card(results: dict[str, dict[str, Any]]) -> str:
    """The page."""
    import torch
    import transformers

    template = Path(__file__).with_name("lock_card.md").read_text()
    return template.format(
        cases=len(next(iter(results.values()))),
        saved=transformers.__version__,
        table=table(results),
        date=datetime.date.today().isoformat(),
        torch=torch.__version__.split("+")[0],
        python=".".join(map(str, sys.version_info[:2])),
        command="python " + shlex.join(["scripts/check_lock.py", *sys.argv[1:]]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for environments and retrofits; kept")
    parser.add_argument("--releases", help="by default the last patch of each minor release since 4.50")
    parser.add_argument("--card", type=Path, help="the Markdown file to write")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    retrofits, environments = folder / "retrofits", folder / "environments"
    retrofits.mkdir(parents=True, exist_ok=True)
    make_retrofits(retrofits)
    results = {}
    for release in arguments.releases.split(",") if arguments.releases else last_patches():
        python = environment(environments, release)
        results[release] = probe(python, retrofits, folder / "scratch" / release)
        print(table({release: results[release]}).splitlines()[-1], flush=True)
    (folder / "found.json").write_text(json.dumps(results, indent=1))
    if arguments.card:
        arguments.card.write_text(card(results))


if __name__ == "__main__":
    main()
