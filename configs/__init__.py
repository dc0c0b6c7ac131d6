"""Hydra configurations: one file a command, groups `data` and `experiment`."""
