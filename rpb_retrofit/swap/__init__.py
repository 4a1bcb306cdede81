"""Retrofitting a model in memory: what is checked, attached, filled, recorded and taken back."""
