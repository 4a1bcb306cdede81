"""``python -m tests.diagnosis.table``: every planted fault and what diagnosis named first, as a Markdown table."""

from __future__ import annotations

import copy
import tempfile

import torch

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.diagnosis.run import run_diagnosis
from tests.diagnosis.examined import HEALTHY, measurements_of
from tests.diagnosis.faults import FAULTS
from tests.diagnosis.small_model import retrofitted, trained


def main() -> None:
    torch.set_num_threads(1)
    source = trained("llama")
    print("| planted | named first | also confirmed |\n|---|---|---|")
    right = 0
    with tempfile.TemporaryDirectory() as folder:
        retrofitted(source).save_pretrained(folder)
        for fault in FAULTS:
            arms = Arms(rpb.load(folder).eval(), copy.deepcopy(source))
            arms = fault.plant(arms) or arms
            names = named(measurements_of(arms, fault.lengths, fault.text))
            right += names[:1] == [fault.cause]
            first = names[0] if names else "nothing"
            mark = "" if first == fault.cause else f" (wrong: {fault.cause})"
            print(f"| {fault} | {first}{mark} | {', '.join(names[1:])} |", flush=True)
    print(f"\n{right} of {len(FAULTS)} named first.\n\n| healthy | named |\n|---|---|")
    for family, seed, settings in HEALTHY:
        model = source if (family, seed) == ("llama", 0) else trained(family, seed, first=0, then=60)
        names = named(measurements_of(Arms(retrofitted(model, **settings), model)))
        print(f"| {family}, seed {seed}, {settings or 'tables only'} | {', '.join(names) or 'nothing'} |", flush=True)


def named(measurements: Measurements) -> list[str]:
    """The confirmed hypotheses, the first cause first."""
    return [cause.name for cause in run_diagnosis(measurements, figures=False).causes]


if __name__ == "__main__":
    main()
