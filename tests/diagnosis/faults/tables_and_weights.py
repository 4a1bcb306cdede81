"""Faults of the numbers: tables, weights, and settings that give them another meaning."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from rpb_retrofit.diagnosis.arms import Arms
from tests.diagnosis.faults.planting import EVERYWHERE, fault, reloaded, tables
from tests.diagnosis.small_model import retrofitted, trained


@fault("tables not loaded: zeros", "tables_not_loaded", **EVERYWHERE)
def tables_zero(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.zero_()


@fault("tables not loaded: one number", "tables_not_loaded", **EVERYWHERE)
def tables_constant(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data[:] = table.data[:, :1]


@fault("all heads alike", "tables_not_loaded", **EVERYWHERE)
def heads_alike(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data[:] = table.data[:1]


@fault("tables of random numbers", "foreign_tables", **EVERYWHERE)
def tables_random(arms: Arms, count: int | None) -> None:
    for number, table in enumerate(tables(arms, count)):
        table.data.normal_(0, 2, generator=torch.Generator().manual_seed(number))


@fault("another layer's table", "tables_shared", **EVERYWHERE)
def tables_shared(arms: Arms, count: int | None) -> None:
    first = tables(arms)[-1].data.clone()
    for table in tables(arms, count):
        table.data.copy_(first)


@fault("one head's row upside down", "foreign_tables", **{"head 0": 0, "head 1": 1, "head 2": 2, "head 3": 3})
def row_flipped(arms: Arms, head: int) -> None:
    tables(arms)[len(tables(arms)) // 2].data[head] *= -1


@fault("heads in another order", "wrong_order", **{"rolled in all layers": None, "rolled in one layer": 1})
def heads_rolled(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.copy_(table.data.roll(1, 0))


@fault("layers in another order", "wrong_order", all=None, two=2)
def layers_reversed(arms: Arms, count: int | None) -> None:
    before = [table.data.clone() for table in tables(arms, count)]
    for table, other in zip(tables(arms, count), reversed(before), strict=True):
        table.data.copy_(other)


@fault("the maximum distance of the config was changed", "other_buckets", **{"to a quarter": 0.25, "to twice": 2})
def other_distance(arms: Arms, factor: float) -> Arms:
    distance = round(factor * arms.settings["relative_attention_max_distance"])
    settings = {**arms.settings, "relative_attention_max_distance": distance}
    return replace(arms, retrofit=reloaded(arms.retrofit, rpb_retrofit=settings))


@fault("sign of the tables reversed", "wrong_scale", **EVERYWHERE)
def tables_negated(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.neg_()


@fault("tables moved by one bucket", "off_by_one", **EVERYWHERE)
def tables_moved(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.copy_(torch.cat([table.data[:, :1], table.data[:, :-1]], 1))


@fault("tables rounded to bfloat16", "precision", **EVERYWHERE)
def tables_rounded(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data.copy_(table.data.bfloat16().float())


@fault("tables cast to bfloat16", "precision", **EVERYWHERE)
def tables_cast(arms: Arms, count: int | None) -> None:
    for table in tables(arms, count):
        table.data = table.data.bfloat16()


@fault("a weight is NaN", "not_finite")
def weight_nan(arms: Arms) -> None:
    next(arms.retrofit.parameters()).data[3, 3] = math.nan


@fault("a layer's weights are damaged", "weights_differ", **{"by noise": 0.5, "slightly": 0.02})
def weights_damaged(arms: Arms, size: float) -> None:
    weight = arms.retrofit.base_model.layers[1].mlp.up_proj.weight.data
    weight += size * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


@fault("another model's retrofit", "weights_differ")
def another_model(arms: Arms) -> Arms:
    return replace(arms, retrofit=retrofitted(trained("llama", 5, first=0, then=40)))


@fault("kept frequencies of the config were dropped", "settings_differ", **{"all": 0, "half of them": 2})
def kept_dropped(arms: Arms, kept: int) -> Arms:
    retrofit = retrofitted(arms.source, keep=4)
    settings = {**retrofit.config.rpb_retrofit, "kept_frequencies": {"inv_freq": kept} if kept else {}}
    return replace(arms, retrofit=reloaded(retrofit, rpb_retrofit=settings))


@fault("frequencies kept by layers were dropped", "settings_differ")
def kept_in_layers_dropped(arms: Arms) -> Arms:
    retrofit = retrofitted(arms.source, keep="2,1:4")
    settings = {name: value for name, value in retrofit.config.rpb_retrofit.items() if name != "kept_in_layers"}
    return replace(arms, retrofit=reloaded(retrofit, rpb_retrofit=settings))


@fault("an epsilon of the config is not the source's", "settings_differ")
def other_epsilon(arms: Arms) -> None:
    arms.retrofit.config.rms_norm_eps = 1e-2


@fault("a module's epsilon is not its config's", "settings_differ")
def other_module_epsilon(arms: Arms) -> None:
    for module in arms.retrofit.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-1


@fault("queries grow with position", "position_scaling")
def queries_grow(arms: Arms) -> None:
    def grow(module: Any, args: Any, output: Any) -> Any:
        return output * (1 + 0.1 * torch.arange(output.shape[1]).log1p())[None, :, None]

    for module in arms.attentions.values():
        module.q_proj.register_forward_hook(grow)


@fault("far buckets were not trained", "untrained_buckets", **{"they hold noise": 3.0, "they hold zeros": 0.0})
def far_buckets(arms: Arms, size: float) -> None:
    for number, table in enumerate(tables(arms)):
        far = table.data[:, table.shape[1] * 5 // 8 :]
        noise = torch.randn(far.shape, generator=torch.Generator().manual_seed(number))
        far.copy_(size * noise + (0 if size else table.data.amax()))
