"""No plain class loads a retrofit, whatever release of Transformers reads it; scripts/check_lock.py tries the releases.

Here the installed one is made to read what older ones read: a config.json without the names that they ignore.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import rpb_retrofit as rpb
from rpb_retrofit.errors import ReleaseError
from rpb_retrofit.runtime import modeling, releases
from tests.families.cases import CASES, Case
from tests.families.test_contract import AUTO, inputs_of, retrofitted, tokens

MECHANISMS = ("llama", "gpt2", "pegasus", "bloom", "mpt", "falcon", "t5", "bert", "distilbert", "modernbert", "mixtral")
every_mechanism = pytest.mark.parametrize("case", [case for case in CASES if str(case) in MECHANISMS], ids=str)

PUBLIC = ("attn_implementation", "experts_implementation")
"""What Transformers before 5.4 throws away when it reads a config.json."""


def edit(folder: Path, *removed: str) -> dict:
    """Take keys out of a checkpoint's config.json; what is left."""
    file = folder / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in removed}
    file.write_text(json.dumps(config))
    return config


@every_mechanism
def test_a_plain_load_is_refused_before_5_4_too(case: Case, tmp_path: Path) -> None:
    retrofitted(case).save_pretrained(tmp_path)
    edit(tmp_path, *PUBLIC)
    auto = getattr(transformers, AUTO[case.kind])
    for cls in (auto, getattr(transformers, case.model), transformers.AutoModel):
        for given in ({}, {"attn_implementation": "eager"}, {"experts_implementation": "eager"}):
            with pytest.raises(ValueError, match=r"rpb_retrofit\.load\(path\).*trust_remote_code=True"):
                cls.from_pretrained(tmp_path, **given)
    with pytest.raises(ValueError, match=r"rpb_retrofit\.load\(path\)"):  # both by hand: Auto classes still refuse
        auto.from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager")


@every_mechanism
def test_what_a_model_of_4_x_does_with_its_pruned_heads(case: Case, tmp_path: Path) -> None:
    """``PretrainedConfig.from_dict`` and ``PreTrainedModel.prune_heads`` of 4.50 to 4.57, the lines that read them."""
    retrofitted(case).save_pretrained(tmp_path)
    pruned = {int(key): value for key, value in edit(tmp_path)["pruned_heads"].items()}  # a readable config
    with pytest.raises(TypeError):
        {layer: set(pruned.get(layer, [])) | set(heads) for layer, heads in pruned.items()}


@every_mechanism
@torch.no_grad()
def test_a_retrofit_with_the_former_lock_loads_and_is_saved_with_this_one(case: Case, tmp_path: Path) -> None:
    model, inputs = retrofitted(case), inputs_of(case, tokens())
    model.save_pretrained(tmp_path / "old")
    written = edit(tmp_path / "old")
    edit(tmp_path / "old", *set(modeling.LOCKS) - set(PUBLIC))
    loaded = rpb.load(tmp_path / "old").eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.save_pretrained(tmp_path / "new")
    again = edit(tmp_path / "new")
    assert {key: again[key] for key in modeling.LOCKS} == {key: written[key] for key in modeling.LOCKS}


def runs_with(folder: Path, release: str) -> str:
    """What importing a checkpoint's code says where ``transformers`` is nothing but a release number."""
    stub = folder / "stub"
    (stub / "transformers").mkdir(parents=True)
    (stub / "transformers" / "__init__.py").write_text(f"__version__ = {release!r}\n")
    modeling.write_runtime(stub / "checkpoint")
    ran = subprocess.run([sys.executable, "-c", "import checkpoint.modeling"], cwd=stub, capture_output=True, text=True)
    assert ran.returncode == 1
    return ran.stderr.splitlines()[-1]


@pytest.mark.parametrize("release", ["4.50.3", "5.3.0", "5.16.1"])
def test_travelling_code_names_the_release_it_needs_before_it_fails(release: str, tmp_path: Path) -> None:
    said = runs_with(tmp_path, release)
    assert f"needs Transformers 5.17 or later, and {release} is installed: pip install 'transformers>=5.17'" in said
    assert "ReleaseError" in said


def test_travelling_code_goes_on_with_the_oldest_release_and_later(tmp_path: Path) -> None:
    assert "ReleaseError" not in runs_with(tmp_path, "5.17.0")
    for release in ("5.17.0", "5.24.0.dev0", "6.0.0", transformers.__version__):
        releases.check_release(release)


def test_a_family_may_need_a_later_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """UMT5's decoder was not told from its encoder before 5.18: logits off by 1.2, and nothing said."""
    case = next(case for case in CASES if case.family == "umt5")
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(ReleaseError, match=r"needs Transformers 5\.18 or later, and 5\.17\.0 is installed"):
        retrofitted(case)


def test_old_releases_find_every_file_that_the_code_needs() -> None:
    """They copy from a folder what its main file names by a relative import, and no more; 4.50 loops on a circle."""
    folder = Path(modeling.__file__).parent

    def named(name: str) -> set[str]:  # by the pattern of transformers.dynamic_module_utils
        text = (folder / name).read_text()
        return {f"{found}.py" for found in re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)}

    assert named("modeling.py") == set(modeling.RUNTIME_FILES) - {"modeling.py"}

    def visit(name: str, path: tuple[str, ...] = ()) -> None:
        assert name not in path, f"circle: {(*path, name)}"
        for other in named(name):
            visit(other, (*path, name))

    visit("modeling.py")


def test_no_release_of_the_table_was_left_out() -> None:
    """The card says of each minor release since 4.50 what happened, and nothing in it was loaded by mistake."""
    card = (Path(__file__).parents[1] / "model_cards" / "releases.md").read_text()
    rows = re.findall(r"^\| (\d+)\.(\d+)\.\d+ \|.*$", card, flags=re.MULTILINE)
    minors = {(int(major), int(minor)) for major, minor in rows}
    assert {(4, minor) for minor in range(50, 58)} | {(5, minor) for minor in range(24)} <= minors
