"""Pages: HTML files that hold their pictures, their style and their one script, and load nothing.

The browser enforces this: a policy in the page allows no script but this one, and no address but ``data:``.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from prism_meta.report.text import format_dice, format_ends, format_mm, format_number

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, *, title: str, sections: Mapping[str, str], **values: Any) -> str:
    """Fill a template that extends ``base.html.j2``.

    Args:
        template: its name.
        title: title of the page.
        sections: their headings, in order. Section ``name`` is filled from ``_name.html.j2``.
        values: what the template and its sections show.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    from markupsafe import Markup

    script = (files("prism_meta.report") / "templates" / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            sections=sections,
            script=Markup(script),  # a file of this package
            script_hash=f"sha256-{digest}",
            **values,
        )
    )


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("prism_meta.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(dice=format_dice, mm=format_mm)
    environment.globals.update(number=format_number, ends=format_ends)
    return environment
