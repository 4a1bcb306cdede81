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
    from tests.families.test_contract import AUTO, inputs_of, retrofitted, tokens

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


def probe(python: Path, folder: Path, modules: Path) -> dict[str, Any]:
    """What `lock_probe` found, by case."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("lock_probe.py")
    ran = subprocess.run([python, script, folder], capture_output=True, text=True, env=variables, timeout=1800)
    if ran.returncode:
        raise SystemExit(f"{python}: {ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])


def plain_cell(found: dict[str, Any], given: str) -> str:
    """How many plain loads were refused, how many of them with the remedy; which succeeded."""
    loads = {
        f"{name} as {cls}": error
        for name, case in found.items()
        if case["known"] and given in case["plain"]
        for cls, error in case["plain"][given].items()
    }
    if not loads:
        return "no such argument"
    refused = [error for error in loads.values() if error is not None]
    told = sum(all(word in error for word in REMEDY) for error in refused)
    cell = f"{len(refused)} of {len(loads)} refused, {told} with the remedy"
    return cell if len(refused) == len(loads) else f"**{cell}**"


def remote_cell(found: dict[str, Any]) -> str:
    """How many loads with the checkpoint's own code gave the retrofit's logits, or what they said."""
    known = {name: case["remote"] for name, case in found.items() if case["known"]}
    right = [name for name, load in known.items() if load["difference"] is not None and load["difference"] < 1e-5]
    told = [name for name, load in known.items() if load["error"] and "needs Transformers" in load["error"]]
    other = sorted(set(known) - set(right) - set(told))
    parts = [f"{len(right)} of {len(known)} right"] if right else []
    parts += [f"{len(told)} of {len(known)} name the release that is needed"] if told else []
    return ", ".join(parts + ([f"**otherwise: {', '.join(other)}**"] if other else []))


GIVEN = {"nothing": "plain load", "attention": "with `attn_implementation=`", "both": "with `experts_implementation=` too"}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a release."""
    head = ["Transformers", "models that it knows", *GIVEN.values(), "`trust_remote_code=True`"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for release, cases in found.items():
        known = f"{sum(case['known'] for case in cases.values())} of {len(cases)}"
        cells = [release, known, *(plain_cell(cases, given) for given in GIVEN), remote_cell(cases)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
    found = {}
    for release in arguments.releases.split(",") if arguments.releases else last_patches():
        python = environment(environments, release)
        found[release] = probe(python, retrofits, folder / "modules" / release)
        print(table({release: found[release]}).splitlines()[-1], flush=True)
    (folder / "found.json").write_text(json.dumps(found, indent=1))
    if arguments.card and False:
        arguments.card.write_text(card(found))


if __name__ == "__main__":
    main()
