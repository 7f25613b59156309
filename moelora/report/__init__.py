"""What the experts of a mixture do: measured as data frames, drawn as figures, told in one HTML page."""
