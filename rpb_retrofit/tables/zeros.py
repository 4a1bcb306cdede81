"""Tables of zeros: the source without positions, the yardstick of every other initialisation."""

from __future__ import annotations

from rpb_retrofit.tables.table_spec import Start, TableSpec


def zeros(spec: TableSpec) -> Start:
    """A float32 table (heads, buckets) of zeros."""
    import torch  # late: `rpb retrofit` starts copying before it

    return Start(torch.zeros(spec.heads, spec.bucketing.num_buckets))
