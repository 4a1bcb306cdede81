"""Loads retrofits where rpb_retrofit cannot be imported: one warm process, a JSON request a line.

Request: {"folder", "inputs" (a file of tensors), "auto", "concrete"}.
Answer: {"logits": file, "plain": {class: error}}, or {"error": ...}.
"""

from __future__ import annotations

import json
import sys
import warnings

sys.modules["rpb_retrofit"] = None  # any import of it fails from here on

import torch  # noqa: E402
import transformers  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.simplefilter("ignore")


def attempt(load, *args, **kwargs):
    try:
        load(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def answer(request: dict) -> dict:
    folder, auto = request["folder"], getattr(transformers, request["auto"])
    reply: dict = {"plain": {}}
    for name in (request["auto"], request["concrete"], "AutoModel"):
        for extra in ({}, {"attn_implementation": "eager"}, {"experts_implementation": "eager"}):
            reply["plain"][f"{name} {extra}"] = attempt(getattr(transformers, name).from_pretrained, folder, **extra)
    try:
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    except Exception as error:
        reply["error"] = f"{type(error).__name__}: {error}"
        return reply
    inputs = torch.load(request["inputs"])
    with torch.no_grad():
        torch.save(model(**inputs).logits, request["inputs"] + ".logits")
    reply["logits"] = request["inputs"] + ".logits"
    return reply


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
