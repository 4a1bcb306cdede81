"""Getting inside a running model, and out again: each context manager restores what it touched, whatever happens."""
