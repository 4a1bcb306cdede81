"""All that a retrofitted checkpoint needs to run. Flat, with relative imports only: it is copied into checkpoints."""
