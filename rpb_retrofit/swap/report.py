"""What a retrofit did, as a report."""

from __future__ import annotations

from dataclasses import dataclass, field

from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.attach import own_names, table_names
from rpb_retrofit.runtime.families import TABLE
from rpb_retrofit.tables.calibrate import CalibrationReport
from rpb_retrofit.tables.polish import PolishReport


@dataclass(frozen=True)
class RetrofitReport:
    """What a retrofit did: to which mechanism, in which layers, at how many parameters."""

    mechanism: str
    layers_expected: int
    layers_patched: list[str]
    tables: list[str]
    parameters_added: int
    num_buckets: int
    max_distance: int
    init: str
    calibration: CalibrationReport | None = None
    polish: PolishReport | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        swap = (
            f"{self.mechanism} -> T5 bias: {len(self.layers_patched)} of {self.layers_expected} layers patched, "
            f"{len(self.tables)} tables of {self.num_buckets} buckets to distance {self.max_distance} "
            f"(init {self.init}), {self.parameters_added:,} parameters added"
        )
        more = [str(part) for part in (self.calibration, self.polish) if part is not None]
        return "\n".join([swap, *self.notes, *more])


def report(
    anatomy: Anatomy, notes: list[str], calibration: CalibrationReport | None, polish: PolishReport | None
) -> RetrofitReport:
    """Describe an attached model, and where its tables come from."""
    model, settings = anatomy.model, anatomy.model.config.rpb_retrofit
    return RetrofitReport(
        mechanism=anatomy.family.mechanism,
        layers_expected=len(anatomy.blocks),
        layers_patched=[name for name, module in anatomy.attentions.items() if hasattr(module, TABLE)],
        tables=table_names(model),
        parameters_added=sum(model.get_parameter(name).numel() for name in own_names(model)),
        num_buckets=settings["relative_attention_num_buckets"],
        max_distance=settings["relative_attention_max_distance"],
        init=settings["init"],
        calibration=calibration,
        polish=polish,
        notes=notes,
    )
