"""Measurements: loading, speed and quality, printed as ratios taken in one run."""
