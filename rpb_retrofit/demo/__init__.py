"""The main job on a small real model, from nothing to a report."""
