"""The version, alone in its file so that everything may import it. It travels: readers of checkpoints compare."""

__version__ = "0.1.0"
