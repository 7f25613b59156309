"""Colours that the colour-blind tell apart (Okabe and Ito, 2008), and what tells experts apart without colour."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
"""Ordered so that neighbours differ in lightness too. Black, the eighth of the set, vanishes on a dark page: grey."""

DASHES = ("-", "--", ":", "-.")
"""Line styles; an expert beyond the eighth repeats a colour with the next of them."""
