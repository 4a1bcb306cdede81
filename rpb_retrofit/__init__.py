"""rpb_retrofit: swap the positional mechanism of a pretrained Transformers model for T5's relative position bias."""

from rpb_retrofit.checkpoint.load import load
from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.inplace import RetrofitReport, retrofit, revert
from rpb_retrofit.version import __version__

__all__ = ["RetrofitConfig", "RetrofitReport", "__version__", "load", "retrofit", "revert"]
