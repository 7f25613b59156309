"""Does a mixture pay? Quality of every method at equal parameters and equal time (docs/quality.md)."""
