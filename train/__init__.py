"""Retraining a converted model with DeepSpeed. `python -m brumby.train RUN` is one rank of it."""
