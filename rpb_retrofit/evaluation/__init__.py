"""Measurements on a model: what they count, over which text, and how the text is cut is part of each result."""
