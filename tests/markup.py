"""What drawings say, read from their markup."""

from __future__ import annotations

import xml.etree.ElementTree as ET

SVG = "{http://www.w3.org/2000/svg}"


def drawn(markup: str) -> ET.Element:
    """The drawing, which is well-formed."""
    return ET.fromstring(markup)


def texts(element: ET.Element, tag: str) -> list[str]:
    """What elements of a kind contain."""
    return [node.text or "" for node in element.iter(tag)]
