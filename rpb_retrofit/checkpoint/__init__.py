"""Checkpoints on disk: reading them, writing them whole or not at all, without loading weights where that can be."""
