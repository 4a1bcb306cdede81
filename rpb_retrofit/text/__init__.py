"""Text to calibrate, to train and to evaluate on."""
