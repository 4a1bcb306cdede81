"""The model card of a retrofit, from what was really run."""
