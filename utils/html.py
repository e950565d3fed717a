"""Self-contained HTML pages: nothing is fetched, light and dark, readable on a phone."""

import base64
import hashlib
import html
import re

from utils.terminal import printable

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>
:root {{ color-scheme: light dark; }}
body {{ font-family: sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; overflow-wrap: anywhere; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; }} pre {{ white-space: pre-wrap; }}
th, td {{ border: 1px solid #8888; padding: 0.3em 0.6em; text-align: left; vertical-align: top; }}
{style}</style></head><body>
<h1>{title}</h1>
{body}
{script}</body></html>
"""


def html_page(title: str, body: str, style: str = "", script: str = "") -> str:
    """Returns a page. title: text, which is escaped; body: HTML; style: more CSS; script: the only one that may run."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy, script = f"{policy}; script-src 'sha256-{digest}'", f"<script>{script}</script>\n"
    return _PAGE.format(title=html.escape(title), body=body, style=style, policy=policy, script=script)


def html_table(header, rows: list[list]) -> str:
    """Returns an HTML table of escaped texts."""
    lines = [(header, "th"), *((row, "td") for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) for row, tag in lines)
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "\n</table>"


def markdown(text: str) -> str:
    """Returns Markdown that shows the text as it is: no HTML, links or pictures."""
    return re.sub(r"[\\`*_\[\]]", r"\\\g<0>", html.escape(printable(text), quote=False))
