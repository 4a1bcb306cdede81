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
from rpb_retrofit.errors import AttentionImplementationError, ReleaseError
from rpb_retrofit.runtime import locks, modeling, releases
from tests.families.cases import BY_NAME, CASES, Case
from tests.support.tiny_models import AUTO, CONFIG, build, inputs_of, retrofitted, saved_config, tokens

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
    assert edit(tmp_path, *PUBLIC)["_attn_implementation_internal"] == locks.LOCK  # what 4.50 to 5.2 check
    eager = dict.fromkeys(PUBLIC, "eager")
    for cls in (getattr(transformers, AUTO[case.kind]), getattr(transformers, case.model), transformers.AutoModel):
        for given in ({}, *({name: "eager"} for name in PUBLIC), eager):
            with pytest.raises(ValueError, match=r"rpb_retrofit\.load\(path\).*trust_remote_code=True"):
                cls.from_pretrained(tmp_path, **given)


@every_mechanism
@torch.no_grad()
def test_a_retrofit_with_the_former_lock_loads_and_is_saved_with_this_one(case: Case, tmp_path: Path) -> None:
    model, inputs = retrofitted(case), inputs_of(case, tokens())
    model.save_pretrained(tmp_path / "old")
    written = saved_config(tmp_path / "old")
    edit(tmp_path / "old", *locks.FILE_LOCKS)
    loaded = rpb.load(tmp_path / "old").eval()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    loaded.save_pretrained(tmp_path / "new")
    assert saved_config(tmp_path / "new") == written and written["transformers_weights"] == locks.LOCK


def test_the_retrofitted_class_itself_takes_what_goes_into_the_config(tmp_path: Path) -> None:
    model = retrofitted(CASES[0])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, use_cache=False, dtype=torch.bfloat16)
    assert not again.config.use_cache and again.dtype == torch.bfloat16
    assert not set(locks.FILE_LOCKS[:1]) & set(vars(again.config)) and "save_pretrained" not in vars(model.config)
    with pytest.raises(AttentionImplementationError):
        type(model).from_pretrained(tmp_path, attn_implementation="sdpa")


def runs_with(folder: Path, release: str) -> str:
    """What importing a checkpoint's code says where ``transformers`` is nothing but a release number."""
    stub = folder / "stub"
    (stub / "transformers").mkdir(parents=True)
    (stub / "transformers" / "__init__.py").write_text(f"__version__ = {release!r}\n")
    modeling.write_runtime(stub / "checkpoint")
    ran = subprocess.run([sys.executable, "-c", "import checkpoint.modeling"], cwd=stub, capture_output=True, text=True)
    assert ran.returncode == 1
    return ran.stderr.splitlines()[-1]


@pytest.mark.process
@pytest.mark.parametrize("release", ["4.50.3", "5.3.0", "5.16.1"])
def test_travelling_code_names_the_release_it_needs_before_it_fails(release: str, tmp_path: Path) -> None:
    message = runs_with(tmp_path, release)
    assert f"needs Transformers 5.17 or later, and {release} is installed: pip install 'transformers>=5.17'" in message
    assert "ReleaseError" in message


@pytest.mark.process
def test_travelling_code_goes_on_with_the_oldest_release_and_later(tmp_path: Path) -> None:
    assert "ReleaseError" not in runs_with(tmp_path, "5.17.0")
    for release in ("5.17.0", "5.24.0.dev0", "6.0.0", transformers.__version__):
        releases.check_release(release)


def test_a_family_may_need_a_later_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """UMT5's decoder was not told from its encoder before 5.18: logits off by 1.2, and nothing said."""
    case = BY_NAME["umt5"]
    model = build(case)
    monkeypatch.setattr(modeling.transformers, "__version__", "5.17.0")
    with pytest.raises(ReleaseError, match=r"needs Transformers 5\.18 or later, and 5\.17\.0 is installed"):
        rpb.retrofit(model, CONFIG)
    assert type(model).__name__ == case.model


def test_old_releases_find_every_file_that_the_code_needs() -> None:
    """They copy from a folder what its main file names by a relative import, and no more; 4.50 loops on a circle."""
    folder = Path(modeling.__file__).parent

    def named(name: str) -> set[str]:  # by the pattern of transformers.dynamic_module_utils
        text = (folder / name).read_text()
        return {f"{module}.py" for module in re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)}

    assert named("modeling.py") == set(modeling.RUNTIME_FILES) - {"modeling.py"}

    def visit(name: str, path: tuple[str, ...] = ()) -> None:
        assert name not in path, f"circle: {(*path, name)}"
        for other in named(name):
            visit(other, (*path, name))

    visit("modeling.py")


def test_the_card_says_that_every_release_refused() -> None:
    card = (Path(__file__).parents[2] / "model_cards" / "releases.md").read_text()
    rows = re.findall(r"^\| (\d+)\.(\d+)\.\d+ \|(.*)$", card, flags=re.MULTILINE)
    minors = {(int(major), int(minor)) for major, minor, _ in rows}
    assert {(4, minor) for minor in range(50, 58)} | {(5, minor) for minor in range(24)} <= minors
    assert not any("**" in row for *_, row in rows), "bold is what was loaded by mistake"
