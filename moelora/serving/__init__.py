"""A mixture outside its training script: what servers need of it, and the plug-ins for theirs."""
