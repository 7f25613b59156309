"""One domain after another: what is forgotten, by sequential LoRA, replay, joint training and a mixture that grows."""
