"""Texts of domains: where they come from, their tokens, and what training reads of them."""
