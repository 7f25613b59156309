"""How experts are drawn, on the page and in figures: no distinction hangs on colour."""

from typing import NamedTuple

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
"""Colours that the colour-blind tell apart (Okabe and Ito, 2008), ordered so that neighbours differ in lightness too.
Black, the eighth of the set, vanishes on a dark page: grey."""

_LINES = (("solid", ()), ("dashed", (7, 4)), ("dotted", (2, 4)), ("double", (9, 3, 2, 3)))


class Style(NamedTuple):
    """A colour, a line by its name in CSS, and that line's dashes as lengths drawn and left out."""

    colour: str
    line: str
    dash: tuple[int, ...]


def style_of(expert: int) -> Style:
    """An expert's style; lines shift every fourth expert, so that the two blues differ in line."""
    return Style(COLOURS[expert % len(COLOURS)], *_LINES[(expert + expert // len(_LINES)) % len(_LINES)])
