"""What the experts of a mixture do: measured as data frames, drawn as figures, shown in one HTML page."""
