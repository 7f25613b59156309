"""What can be done with experts once they exist: import, export and the operations that reshape a mixture."""
