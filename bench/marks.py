"""Figures in a page that people write: a command puts them between two marks."""

BEGIN, END = "<!-- figures: written by a command -->", "<!-- end of figures -->"


def begin(of: str) -> str:
    """Return the first mark of figures with a name, for pages that have several."""
    return BEGIN.replace("figures:", f"figures of {of}:")


def replaced(text: str, figures: str, of: str = "") -> str:
    """Return the page with other figures between its marks.

    Args:
        text: the page.
        figures: what is to stand between the marks.
        of: the figures' name; none where a page has but one.

    Raises:
        ValueError: the page has no marks.
    """
    mark = begin(of) if of else BEGIN
    before, found, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"the page has no {mark} and {END}")
    return f"{before}{mark}\n\n{figures}\n\n{END}{after}"
