"""How files are opened, staged, and replaced in one moment. Knows no model and no configuration."""
