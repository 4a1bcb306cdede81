"""The version, alone in its file so that everything may import it. It travels with checkpoints: their readers compare."""

__version__ = "0.1.0"
