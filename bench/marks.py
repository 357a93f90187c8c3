"""Figures in a page that people write: a command puts them between two marks."""

BEGIN, END = "<!-- figures: written by a command -->", "<!-- end of figures -->"


def replaced(text: str, figures: str) -> str:
    """Return the page with other figures between its marks.

    Raises:
        ValueError: the page has no marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"
