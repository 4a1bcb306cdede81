"""Tables as Transformers initialises T5's: for training, not for use as they are.

Source: ``T5PreTrainedModel._init_weights`` in ``transformers/models/t5/modeling_t5.py``, where the standard deviation
is ``initializer_factor * d_model ** -0.5``; the factor is 1.
"""

from __future__ import annotations

from rpb_retrofit.tables.place import Place, Start


def normal(place: Place) -> Start:
    """A float32 table (heads, buckets) of normal numbers, the same for the same seed."""
    import torch  # late: `rpb retrofit` starts copying before it

    generator = torch.Generator().manual_seed(place.seed)
    table = torch.randn(place.heads, place.bucketing.num_buckets, generator=generator)
    return Start(table * place.hidden_size**-0.5)
