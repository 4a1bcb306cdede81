"""Choosing a positional mechanism: arms, one budget, their measures, a recommendation. See `run.compare`."""
