"""What mkdocs can't do from files alone: pages of executed notebooks, and the page of progress.

mkdocs loads this as a hook. A notebook that was not executed is an error of a strict build; while
one writes (`nox -s docs-serve`) it is shown without outputs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from traitlets.config import Config

sys.path.insert(0, str(Path(__file__).parent))

from notebooks import Source, executed_facts, sources
from progress import progress_page

TEMPLATES = Path(__file__).parent / "notebook_page"
DRAFT = "DS_DOCS_DRAFT"  # set: notebooks need not have been executed


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is generated."""
    for source in sources():
        for name, content in notebook_files(source).items():
            files.append(File.generated(config, name, content=content))
    files.append(File.generated(config, "progress.md", content=progress_page()))
    return files


def notebook_files(source: Source) -> dict[str, str | bytes]:
    """Return the page of a notebook, its figures and the notebook itself, by path in the site.

    Raises:
        PluginError: It was not executed, or is another one by now.
    """
    fresh = source.is_fresh()
    if not fresh and DRAFT not in os.environ:
        command = f"python tools/notebooks.py run {source.path}"
        raise PluginError(f"{source.path}: not executed since it changed; {command}")
    name = f"notebooks/{source.path.parent.name}/{source.path.stem}"
    settings = Config()
    settings.MarkdownExporter.template_name = TEMPLATES.name
    settings.MarkdownExporter.extra_template_basedirs = [str(TEMPLATES.parent)]
    # What stands first is shown: figures before HTML, HTML before text; widgets need a kernel.
    settings.NbConvertBase.display_data_priority = [
        "image/png",
        "text/html",
        "text/markdown",
        "text/plain",
    ]
    exporter = MarkdownExporter(config=settings)
    prefix = f"{source.path.stem}_files"
    resources: dict[str, Any] = {"output_files_dir": prefix, "unique_key": source.path.stem}
    if fresh:
        page, found = exporter.from_filename(str(source.built), resources=resources)
    else:
        page, found = exporter.from_notebook_node(source.notebook, resources=resources)
    title, _, rest = page.lstrip().partition("\n")
    made: dict[str, str | bytes] = {
        f"{name}.md": f"{title}\n\n{about(source, fresh=fresh)}\n{rest}",
    }
    folder = name.rpartition("/")[0]
    for path, content in found.get("outputs", {}).items():
        made[f"{folder}/{path}"] = content
    if fresh:
        made[f"{name}.ipynb"] = source.built.read_bytes()
    return made


def about(source: Source, *, fresh: bool) -> str:
    """Return the lines under a notebook's title."""
    if not fresh:
        return '!!! warning "Not executed: without outputs"\n'
    reading = source.notebook.metadata["ds"]["reading"]
    seconds = executed_facts(source.built)["seconds"]
    return (
        f"*{reading} minutes to work through; executed in {seconds:.0f} seconds for this page.* "
        f"[Download the notebook]({source.path.stem}.ipynb){{ download }} · "
        "[how to open it](../index.md)\n"
    )
