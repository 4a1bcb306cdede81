"""``rpb retrofit SOURCE OUT``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rpb_retrofit.cli.options import Buckets, Json, MaxDistance, check_writable, show
from rpb_retrofit.config import RetrofitConfig


def command(
    source: Annotated[str, typer.Argument(help="A folder, a hub id, or a GGUF file.", metavar="SOURCE")],
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.", metavar="OUT")],
    buckets: Buckets = 32,
    max_distance: MaxDistance = 128,
    init: Annotated[str, typer.Option(help="Where the numbers in the tables come from: zeros.")] = "zeros",
    shared: Annotated[bool, typer.Option("--shared", help="One table for all layers.")] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link the source's shards: instant, and no space is used.")
    ] = False,
    json: Json = None,
) -> None:
    """Swap the positional mechanism of a checkpoint; write a checkpoint that plain Transformers can load."""
    from rpb_retrofit.checkpoint.convert import retrofit_checkpoint

    check_writable("--json", json)
    config = RetrofitConfig(
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
        init=init,
        shared=shared,
    )
    done = retrofit_checkpoint(source, out, config, link=link)
    result = {"out": str(done.out), "weights": done.weights, "shards": done.shards, **asdict(done.report)}
    text = (
        f"{done.report}\n"
        f"weights {done.weights}, {done.shards} shards in {done.out}\n"
        f"load it with rpb_retrofit.load('{done.out}'), or where rpb_retrofit is not installed with\n"
        f"AutoModel...from_pretrained('{done.out}', trust_remote_code=True)"
    )
    show(text, result, json)
