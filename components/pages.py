"""How every HTML page of the platform is made."""

from pathlib import Path

import jinja2


def templates(directory: Path) -> jinja2.Environment:
    """Templates of a directory: text is escaped, and a name that is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(directory),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
