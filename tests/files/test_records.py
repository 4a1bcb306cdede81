"""Nothing on disk is a pickle, and what is damaged there is measured again or named."""

from __future__ import annotations

import ast
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.journal import SUFFIX, Journal
from rpb_retrofit.files.record import REST, DamagedError, pack, unpack

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Point:
    x: float
    row: Any


@dataclass(frozen=True)
class Other:
    x: float


KEYS = st.one_of(st.text(), st.integers(), st.tuples(st.integers(), st.text()))
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner),
        st.lists(inner).map(tuple),
        st.dictionaries(KEYS, inner),
        st.builds(Point, st.floats(allow_nan=False), inner),
        st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([-2, 1, 3])),
    ),
    max_leaves=12,
)


def through_bytes(value: Any) -> Any:
    return unpack(safetensors.torch.load(safetensors.torch.save(pack(value))), (Point,))


@given(VALUES)
def test_values_come_back(value: Any) -> None:
    assert through_bytes(value) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_tensors_come_back(dtype: torch.dtype) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    value = {"view": whole[1:, ::2], "same": whole, "again": whole, "none": whole[:0], "one": whole[0, 0], "t": whole.T}
    again = through_bytes(value)
    for name, tensor in value.items():
        assert again[name].dtype == dtype and torch.equal(again[name], tensor)
    assert math.isnan(through_bytes(math.nan)) and through_bytes(-math.inf) == -math.inf


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    "rest",
    [
        b"{",
        b"[" * 5000,
        b"\xff",
        b'{"record": "Other", "fields": {"x": 1}}',
        b'{"record": "Path", "fields": {}}',
        b'{"record": "Point", "fields": {"x": 1, "y": 2}}',
        b'{"tensor": "7", "device": "cpu"}',
        b'{"tensor": "rest", "device": "nowhere"}',
        b'{"float": "one"}',
        b'{"dict": [[[], 1]]}',
        b'{"dict": [1]}',
        b'{"import": "os"}',
        b'{"record": ["Point"], "fields": {}}',
        pickle.dumps(Evil()),
    ],
)
def test_what_is_no_record(rest: bytes) -> None:
    with pytest.raises(DamagedError, match="it is no record of rpb_retrofit") as caught:
        unpack({REST: torch.frombuffer(bytearray(rest), dtype=torch.uint8)}, (Point,))
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="a set cannot be recorded"):
        pack({1, 2})


def test_no_module_reads_pickles() -> None:
    """Neither the package nor its scripts: all that they keep is safetensors or JSON."""
    forbidden = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    calls = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load"), ("pandas", "read_pickle")}
    for file in [*ROOT.glob("rpb_retrofit/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.partition(".")[0] for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in forbidden, file
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in calls, (file, node.lineno)


# --- the journal -----------------------------------------------------------------------------------------------------


def test_a_pickle_in_a_journal_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a project folder may ship one."""
    monkeypatch.chdir(tmp_path)
    messages: list[str] = []
    with Journal.open(tmp_path / "out.run", {"text": "a"}, "rpb diagnose", (Point,), messages.append) as journal:
        assert journal("one", lambda: 1) == 1
    evil = pickle.dumps(Evil())
    torch.save(Evil(), tmp_path / "out.run" / "two.pt")
    for name in ("one", "two", "three"):
        (tmp_path / "out.run" / f"{name}{SUFFIX}").write_bytes(evil)
        (tmp_path / "out.run" / f"{name}.pt").write_bytes(evil)
    with Journal.open(tmp_path / "out.run", {"text": "a"}, "rpb diagnose", (Point,), messages.append) as journal:
        assert [journal(name, lambda: 2) for name in ("one", "two", "three")] == [2, 2, 2]
    assert len(messages) == 3 and all("measuring again" in line for line in messages)
    assert not (tmp_path / "executed").exists()


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "flipped": flipped,
    "longer": lambda data: data + b"x",
    "lines": lambda data: b"\n\n\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_measurement_is_taken_again(damage: str, tmp_path: Path) -> None:
    messages: list[str] = []
    taken: list[str] = []

    def measure() -> Point:
        taken.append("x")
        return Point(1.5, torch.ones(3))

    for _ in range(2):
        with Journal.open(tmp_path / "run", {"text": "a"}, "rpb diagnose", (Point,), messages.append) as journal:
            assert journal("one", measure).row.tolist() == [1, 1, 1]
    assert len(taken) == 1 and not messages
    file = tmp_path / "run" / f"one{SUFFIX}"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with Journal.open(tmp_path / "run", {"text": "a"}, "rpb diagnose", (Point,), messages.append) as journal:
        assert journal("one", measure).x == 1.5
    assert len(taken) == 2 and "measuring again" in messages[0] and str(file) in messages[0]
    with Journal.open(tmp_path / "run", {"text": "a"}, "rpb diagnose", (Point,), messages.append) as journal:
        journal("one", measure)
    assert len(taken) == 2, "the new one was kept"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, "\udcff"])
def test_a_damaged_identity(content: str, tmp_path: Path) -> None:
    """Each measurement names its examination, so nothing is lost, and nothing of another one is taken."""
    place, messages, taken = tmp_path / "run", list[str](), list[int]()

    def measure() -> int:
        taken.append(1)
        return 1

    def go(identity: dict[str, Any]) -> None:
        with Journal.open(place, identity, "rpb diagnose", (), messages.append) as journal:
            journal("one", measure)

    go({"text": "a"})
    (place / "identity.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    go({"text": "a"})
    assert len(taken) == 1 and "identity.json" in messages[0] and "\n" not in messages[0]
    assert json.loads((place / "identity.json").read_text()) == {"text": "a"}
    with pytest.raises(ConfigError, match="holds an examination with other text"):
        go({"text": "b"})
    (place / "identity.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    go({"text": "b"})
    assert len(taken) == 2, "a measurement of another examination is none of this one"


def test_a_full_disk_costs_the_going_on_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    with Journal.open(tmp_path / "run", {}, "rpb diagnose", (), messages.append) as journal:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("rpb_retrofit.files.journal.write_entry", full)
        assert journal("one", lambda: 1) == 1 and journal("one", lambda: 2) == 1
    assert len(messages) == 1 and "No space left on device" in messages[0]
