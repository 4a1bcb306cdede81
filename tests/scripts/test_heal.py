"""The study of healing a real source, made tiny: all of it, that a stopped run goes on, its card."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.evaluation.nll import token_losses
from rpb_retrofit.text.reading import read_text

ARMS = ("source", "kept-flat", "full-log")
CONTEXT = 64


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """What imports a module of scripts/ by its name, as the scripts import each other."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module


@pytest.fixture
def heal(scripts: Callable[[str], ModuleType]) -> ModuleType:
    """scripts/heal.py."""
    return scripts("heal")


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments for a model of random weights that reads bytes, and texts."""
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "base")
    (prose,) = read_text(None).documents
    arguments = [str(tmp_path / "base"), str(tmp_path / "out"), "--data", str(tmp_path / "train.jsonl")]
    rows = [json.dumps({"text": prose[start : start + 500]}) for start in range(0, 20_000, 500)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    for number in range(7):
        file = tmp_path / f"held-out-{number}.txt"
        file.write_text(prose[100_000 + 3000 * number :][:3000])
        arguments += ["--held-out", str(file)]
    arguments += ["--length", str(CONTEXT), "--times", "2,4", "--tokens", "512", "--batch-tokens", "128"]
    return [*arguments, "--calibration", "256", "--windows", "14", "--ends", "14", "--items", "1", "--precision", "no"]


def parts_of(folder: Path, arm: str) -> dict[str, Any]:
    """What was found of an arm."""
    return json.loads((folder / arm / "result.json").read_text())["parts"]


def test_heal(
    scripts: Callable[[str], ModuleType], command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle and begun again, no part is found out twice; the card has every table."""
    out, begun, trained = tmp_path / "out", list[str](), list[str]()
    heal, arm_module, measures = scripts("heal"), scripts("heal_arm"), scripts("heal_measures")
    real_make, real_finetune = arm_module.ArmRun.make, arm_module.finetune
    real_beyond = measures.MeasuredModel.beyond

    def make(self: Any) -> Any:
        begun.append(self.name)
        return real_make(self)

    def finetune(model: str, *args: Any, **kwargs: Any) -> Any:
        trained.append(model)
        return real_finetune(model, *args, **kwargs)

    def beyond(self: Any) -> Any:
        if stopping and self.name == "full-log":
            raise KeyboardInterrupt
        return real_beyond(self)

    monkeypatch.setattr(arm_module.ArmRun, "make", make)
    monkeypatch.setattr(measures.MeasuredModel, "beyond", beyond)
    monkeypatch.setattr(arm_module, "finetune", finetune)
    card, stopping = tmp_path / "card.md", True
    with pytest.raises(KeyboardInterrupt):
        heal.main([*command, "--arms", ",".join(ARMS)])
    assert [*parts_of(out, "full-log")] == ["made", "before: inside", "trained", "after: inside"]
    heal.main([*command, "--arms", "none", "--card", str(card)])
    assert "full-log" in card.read_text(), "what there is of it"
    stopping = False
    heal.main([*command, "--arms", ",".join(ARMS), "--card", str(card)])
    assert begun == ["kept-flat", "full-log"] and len(trained) == 2
    for arm in ARMS:
        parts = parts_of(out, arm)
        inside, beyond_it = parts["after: inside"], parts["after: beyond"]["lengths"]
        assert len(inside["windows"]) == 14 and inside["tokens"] == 14 * (CONTEXT - 1)
        assert [one["length"] for one in beyond_it] == [64, 128, 256]
        assert inside["by_position"][0][:2] == [1, 1] and inside["by_position"][-1][:2] == [32, 63]
    assert parts_of(out, "full-log")["trained"]["steps"] == 4
    told = card.read_text()
    for words in ("full-log inside the context, at most 0.15", "kept-flat flat at 256 tokens", "| 32-63 |"):
        assert words in told


def test_wrong_input(heal: ModuleType, command: list[str]) -> None:
    with pytest.raises(ConfigError, match="arm 'kept'"):
        heal.main([*command, "--arms", "kept"])
    with pytest.raises(ConfigError, match="--data"):
        heal.main([*command[:2], "--arms", "source"])
    with pytest.raises(DataError, match="holds no result"):
        heal.main([*command, "--arms", "none", "--card", "card.md"])


def test_the_last_positions_are_the_same_tokens(scripts: Callable[[str], ModuleType], command: list[str]) -> None:
    """The losses of a window's end, which no logits but its own are computed for, are those of the whole window."""
    measures = scripts("heal_measures")
    model, tokenizer = open_causal_lm(command[0])
    plan = scripts("heal_plan").HealingPlan(command[0], (), tuple(command[5::2][:1]), length=CONTEXT)
    texts = measures.HeldOutTexts.of(plan, tokenizer)
    ids = texts.window(*texts.ends(256, CONTEXT, 1)[0], 256)
    whole = token_losses(model, ids)[-32:]
    torch.testing.assert_close(measures.last_losses(model, ids, 32), whole.detach(), rtol=1e-5, atol=1e-5)


def test_frequencies_and_tables_stay_float32(scripts: Callable[[str], ModuleType], command: list[str]) -> None:
    model, tokenizer = open_causal_lm(command[0])
    windows = [tokenizer("some text " * 8, return_tensors="pt")["input_ids"]]
    rpb.retrofit(model, rpb.RetrofitConfig(keep_frequencies="auto"), calibration=windows)
    scripts("heal_measures").halve(model)
    assert model.dtype == torch.bfloat16 and model.model.rotary_emb.inv_freq.dtype == torch.float32
    kinds = {parameter.dtype for name, parameter in model.named_parameters() if "relative_attention_bias" in name}
    assert kinds == {torch.float32}


def test_another_plan_is_refused(heal: ModuleType, command: list[str]) -> None:
    heal.main([*command, "--arms", "source"])
    with pytest.raises(ConfigError, match="other tokens"):
        heal.main([*command, "--arms", "source", "--tokens", "1024"])
