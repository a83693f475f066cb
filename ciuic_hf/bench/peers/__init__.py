"""Formats of others, their values computed in torch, so that all are measured in one run on one model."""
