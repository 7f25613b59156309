"""A mixture on disk: saving, loading, LoRA files, run records. Written whole or not at all; read as a stranger's."""
