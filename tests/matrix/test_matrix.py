"""The matrix in a small form: a real model in bfloat16, healthy and with faults; whole: `python -m tests.matrix`."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpb_retrofit.diagnosis.provenance import UNKNOWN
from tests.matrix.__main__ import read
from tests.matrix.cases import Case, healthy, planted, run
from tests.matrix.table import table

pytestmark = pytest.mark.slow

HEALTHY = [
    Case("tables", "bfloat16", 0),
    Case("tables", "bfloat16", 0, recorded=False),
    Case("alibi", "bfloat16", 0),
]
PLANTED = ["tables halved, in one layer", "decoding goes wrong late"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_a_healthy_retrofit_is_told_no_wrong(case: Case, folder: Path) -> None:
    row = run(case, folder)
    assert row["named"] == [] and not row["failed"], row["because"]
    assert max(row["ways"].values()) < 1e-4, "in float32 equal ways are equal"


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named_first(fault: str, folder: Path) -> None:
    case = next(Case("tables", "bfloat16", 0, c.fault) for c in planted() if str(c.fault) == fault)
    row = run(case, folder)
    assert row["named"][:1] == [row["truth"]], row["because"]
    assert UNKNOWN not in str(row["because"])


def test_the_matrix_is_large_and_resumes(tmp_path: Path) -> None:
    cases = [*healthy(), *planted()]
    assert len({case.name for case in cases}) == len(cases) and len(list(healthy())) >= 60
    rows = [
        '{"case": "a, b, c", "truth": null, "named": [], "failed": {}}',
        '{"case": "d, e, f: g", "truth": "x", "named": ["y"], "failed": {}}',
    ]
    (tmp_path / "diagnoses-0-of-1.jsonl").write_text("\n".join(rows))
    page = table(read(tmp_path))
    assert "1 diagnoses, 0 false alarms" in page and "0 of 1 named first" in page and "(wrong: x)" in page
