"""Tables as Transformers initialises T5's: for training, not for use as they are.

Source: ``T5PreTrainedModel._init_weights`` in ``transformers/models/t5/modeling_t5.py``, where the standard deviation
is ``initializer_factor * d_model ** -0.5``; the factor is 1.
"""

from __future__ import annotations

from rpb_retrofit.tables.table_spec import Start, TableSpec


def normal(spec: TableSpec) -> Start:
    """A float32 table (heads, buckets) of normal numbers, the same for the same seed."""
    import torch  # late: `rpb retrofit` starts copying before it

    generator = torch.Generator().manual_seed(spec.seed)
    table = torch.randn(spec.heads, spec.bucketing.num_buckets, generator=generator)
    return Start(table * spec.hidden_size**-0.5)
