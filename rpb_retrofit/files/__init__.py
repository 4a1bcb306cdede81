"""Checkpoints as files: finding them, their headers, whole folders."""
