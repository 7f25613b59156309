"""Whether a runtime that serves an adapter computes with it what it did in training: `moelora verify`."""
