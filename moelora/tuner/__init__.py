"""The PEFT tuner: model, layer, router, PeftModel, and what a user does with them."""
