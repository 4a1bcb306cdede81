"""Diagnosis: what regressed after a retrofit, where, and why."""
