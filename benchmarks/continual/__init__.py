"""Tasks learned one after another: moelora beside the field's methods on the field's sequences."""
