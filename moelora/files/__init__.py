"""How files are opened, checked, staged, and replaced in one moment. Imports no model and no MoELoraConfig."""
