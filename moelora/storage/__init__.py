"""What of a mixture lies on disk: written whole or not at all, and read as what a stranger may have written."""
