"""What measures or shows a model: maps, kept tokens, calibration, heads."""
