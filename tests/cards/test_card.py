"""The model card: what the files say, and nothing that they do not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rpb_retrofit.cards.card import make_card
from rpb_retrofit.errors import CheckpointError, DataError
from tests.support.command import rpb_command
from tests.support.training_cases import PROSE, run, write_retrofit, write_source


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, its retrofit, and the retrofit trained."""
    folder = tmp_path_factory.mktemp("cards")
    source = write_source(folder / "source")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\nbase_model: nobody/else\n---\n")
    (folder / "text.txt").write_text(PROSE)
    write_retrofit(source, folder / "retrofit", relative_attention_num_buckets=16, tail="log", shared=True)
    run(
        folder / "retrofit", folder / "trained", folder / "text.txt", {"stages": [{"tokens": 1280, "lengths": {64: 1}}]}
    )
    return folder


def header(card: Any) -> dict[str, Any]:
    return yaml.safe_load(str(card).split("---")[1])


def test_an_untrained_retrofit(folder: Path) -> None:
    card = make_card(folder / "retrofit")
    text = str(card)
    assert f"rpb retrofit {folder / 'source'} OUT --buckets 16 --init normal --tail log --shared" in text
    assert "| buckets | 16, to distance 128, then on with the distance's logarithm |" in text
    assert "one table for all layers" in text and "# AutoModelForCausalLM.from_pretrained" in text
    assert text.rstrip().endswith(
        "it is an error in Transformers 4.50 and later. `trust_remote_code=True` needs 5.17 or later."
    )
    for absent in ("## Training", "## Evaluation", "frequencies kept", "polished", "None", "undefined"):
        assert absent not in text
    assert header(card) == {
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["rpb_retrofit", "t5-relative-position-bias"],
    }, "a base_model on this disk is none of the hub's, and the source's own is not ours"


def test_a_trained_and_evaluated_retrofit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = tmp_path / "evaluation.json"
    trained = folder / "trained"
    arguments = ["evaluate", trained, "--data", folder / "text.txt", "--lengths", "32", "--tokens", "256"]
    assert rpb_command(monkeypatch, *arguments, "--json", evaluation) == 0
    assert rpb_command(monkeypatch, "card", trained, "--evaluation", evaluation, "--json", tmp_path / "card.json") == 0
    assert "written to" in capsys.readouterr().out
    text = (trained / "README.md").read_text()
    (found,) = json.loads(evaluation.read_text())["lengths"]
    summary = json.loads((trained / "training.json").read_text())
    assert f"| `{trained}` | text.txt | 32 | {found['nll']:.4f} | {found['tokens']} |" in text
    assert f"rpb evaluate {trained} --data {folder / 'text.txt'} --lengths 32 --tokens 256" in text
    (stage,) = summary["stages"]
    assert f"| all | 10 | {stage['scored_tokens']:,} | {stage['losses'][0]:.4f}, {stage['losses'][-1]:.4f} |" in text
    assert f"rpb finetune {folder / 'retrofit'} OUT --recipe recipe.yaml" in text and "![" in text
    assert (trained / "recipe.yaml").read_text().strip() in text
    metadata = json.loads((tmp_path / "card.json").read_text())["metadata"]
    (result,) = metadata["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == round(found["nll"], 4)
    assert rpb_command(monkeypatch, "card", trained) == 2
    assert "exists already: give --force" in capsys.readouterr().err
    assert rpb_command(monkeypatch, "card", trained, "--force") == 0
    assert "## Evaluation" not in (trained / "README.md").read_text()


def test_a_hub_source_is_the_base_model(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "retrofit" / "config.json").read_text())
    config["rpb_retrofit"]["source"] = "someone/model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert header(make_card(tmp_path))["base_model"] == "someone/model"


def test_a_retrofit_with_the_former_lock(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "retrofit" / "config.json").read_text())
    del config["transformers_weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = str(make_card(tmp_path))
    assert "in Transformers 5.4 and later; older releases load it as the source's class" in text
    assert "needs 5" not in text, "it has no releases.py that would say so"


def test_wrong_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a retrofit: its config.json has no 'rpb_retrofit'"):
        make_card(folder / "source")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: No such file"):
        make_card(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="is not what `rpb evaluate --json` writes"):
        make_card(folder / "retrofit", [tmp_path / "other.json"])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken.json is not JSON"):
        make_card(folder / "retrofit", [tmp_path / "broken.json"])
