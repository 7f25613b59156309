"""Serving: whether an adapter does in the runtime that serves it what it did in training."""
