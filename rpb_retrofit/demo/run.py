"""Fetch, retrofit in two ways, evaluate, generate, report."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rpb_retrofit.checkpoint.convert import retrofit_checkpoint
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.demo.fetch import SMOLLM2, fetch
from rpb_retrofit.demo.report import write_report
from rpb_retrofit.demo.result import Demo, Variant, differences
from rpb_retrofit.evaluation.context_use import induction_gains
from rpb_retrofit.evaluation.losses import Losses, token_by_token
from rpb_retrofit.evaluation.plots import bias_by_offset
from rpb_retrofit.files.folder import whole_folder
from rpb_retrofit.files.strict_json import json_text
from rpb_retrofit.pages.drawing import as_data_uri
from rpb_retrofit.tables import CONTENT
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text, read_text
from rpb_retrofit.text.tokens import bos_policy, tokenise

LENGTHS = (128, 512, 2048)
TOKENS = 2048
BEGINNINGS = ("Water boils at a temperature of", "Once upon a time, a young farmer found")
NEW_TOKENS = 40


KINDS: dict[str, dict[str, Any]] = {
    "T5 bias": {"calibrate": CONTENT},
    "T5 bias + high frequencies": {"keep_frequencies": "auto"},
}
"""The retrofits that are shown, and their settings."""


SPANS = {128: 3, 512: 3, 1024: 2, 1900: 2}
"""Repeated spans by the distance in tokens between the two: few, so that the demo stays short."""

SPAN = 16
"""Tokens of a span that is repeated."""


def run_demo(out: Path, config: RetrofitConfig, say: Callable[[str], None]) -> Demo:
    """Run the whole demo into a new folder ``out``: the retrofits, report.html, report.json.

    The first half of the text is for evaluation, the second for calibration.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str) -> Iterator[None]:
        say(f"{name} ...")
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    with whole_folder(out) as folder:
        with step("fetch SmolLM2-135M-Instruct"):
            gguf = fetch(SMOLLM2)
        whole = read_text(None)
        (prose,) = whole.documents
        tested, taught = prose[: len(prose) // 2], prose[len(prose) // 2 :]
        calibration = CalibrationText(Text(f"the second half of {whole.name}", [taught]))
        arms, losses, bias_pictures = list[Variant](), dict[str, list[Losses]](), dict[str, str]()
        for name in ("source (RoPE)", *KINDS):
            target, report = folder / re.sub(r"\W+", "-", name), None
            if name in KINDS:
                with step(f"retrofit: {name}"):
                    kind = replace(config, **KINDS[name])
                    report = retrofit_checkpoint(str(gguf), target, kind, calibration=calibration).report
            with step(f"load: {name}"):
                model, tokenizer = open_causal_lm(str(gguf if report is None else target))
                documents, bos = tokenise(tokenizer, [tested]), bos_policy(tokenizer, "auto")
            with step(f"evaluate: {name}"):
                losses[name] = [token_by_token(model, documents, n, TOKENS, bos, f"{name}, ") for n in LENGTHS]
            with step(f"repeated spans: {name}"):
                gains = induction_gains(model, documents, SPANS, SPAN, bos)
            with step(f"generate: {name}"):
                continuations = [_continue(model, tokenizer, beginning) for beginning in BEGINNINGS]
            place = None if report is None else target.name
            results = [length.by_length() for length in losses[name]]
            arms.append(Variant(name, place, report, results, gains, continuations))
            if report is not None:
                bias_pictures[name] = as_data_uri(partial(bias_by_offset, model), "png")
        policy = "no BOS" if bos is None else "BOS first in every window"
        about = ("SmolLM2-135M-Instruct (4-bit weights, dequantised)", whole.name, policy)
        demo = Demo(*about, arms, seconds, differences(losses), BEGINNINGS, NEW_TOKENS)
        write_report(demo, bias_pictures, folder / "report.html")
        (folder / "report.json").write_text(json_text({**asdict(demo), "costs": demo.costs, "kept": demo.kept}))
    return demo


def _continue(model: Any, tokenizer: Any, beginning: str) -> str:
    inputs = tokenizer(beginning, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
