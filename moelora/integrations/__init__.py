"""Plug-ins for tools that people use already; docs/tools.md has a recipe for each. No other room imports them."""
