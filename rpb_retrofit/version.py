"""The version of the package, which is its runtime's."""

from rpb_retrofit.runtime.version import __version__

__all__ = ["__version__"]
