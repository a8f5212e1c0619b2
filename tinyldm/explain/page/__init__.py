"""The templates of the pages, which are files of this folder, and how they are filled."""

import json
import re
from importlib.resources import files


def fill(template: str, script: str, network: str = "", **texts: str) -> str:
    """Return a template with its {placeholders} replaced.

    script, network: names of files of this folder. texts: HTML, or what `json_for_html` made.
    """
    folder = files(__name__)

    def read(name):
        return (folder / name).read_text(encoding="utf-8").strip() if name else ""

    texts |= {"css": read("report.css"), "network": read(network), "script": read(script)}
    return re.sub(r"\{([a-z]+)\}", lambda found: texts[found[1]], read(template))


def json_for_html(content: object) -> str:
    """Return JSON that can stand in a script element: no "<" ends it, whatever a text holds."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", r"\u003c")
