"""Executed notebooks become pages of the site. Needs the site's tools: `nox -s docs` runs it."""

from __future__ import annotations

import pytest

import notebooks

pytest.importorskip("mkdocs", reason="the site's tools are not here; nox -s docs runs this")
pytest.importorskip("nbconvert", reason="the site's tools are not here; nox -s docs runs this")

from mkdocs.exceptions import PluginError

import pages


def test_pages_of_notebooks(write_notebook, monkeypatch):
    code = (
        "print('hello')\n\n# %% tags=[\"hide-input\"]\n"
        "from IPython.display import HTML\nHTML('<i>x</i>')"
    )
    source = write_notebook(code)
    with pytest.raises(PluginError, match="not executed since it changed"):
        pages.notebook_files(source)
    monkeypatch.setenv(pages.DRAFT, "1")
    draft = pages.notebook_files(source)
    assert "Not executed: without outputs" in draft["notebooks/group/try.md"]
    monkeypatch.delenv(pages.DRAFT)
    notebooks.execute(source)
    made = pages.notebook_files(source)
    page = made["notebooks/group/try.md"]
    assert page.startswith("# A try\n")
    assert "*5 minutes to work through; executed in " in page
    assert "```{ .text .output }\nhello\n```" in page
    assert '??? abstract "The code of this cell"\n\n    ```python\n    from IPython' in page
    assert '<div class="output" markdown="0">\n<i>x</i>' in page
    assert "notebooks/group/try.ipynb" in made
