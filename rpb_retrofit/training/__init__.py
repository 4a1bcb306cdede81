"""Healing a retrofit by fine-tuning, on one process or many, with its control."""
