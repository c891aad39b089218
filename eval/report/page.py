"""A report as one HTML page, which refers to nothing outside it: pictures and their data are in it."""

import base64
import html

from eval.report.content import Content, Table
from eval.report.pictures.picture import Picture


def html_page(content: Content, stem: str) -> str:
    """`stem` begins the names under which the pictures' data are saved."""
    tables = [*content.results, content.settings]
    contents = [*((f"t{i}", table.title) for i, table in enumerate(tables)), ("pictures", "Pictures")]
    links = " · ".join(f'<a href="#{anchor}">{html.escape(name)}</a>' for anchor, name in contents)
    *results, settings = [_section(f"t{i}", table) for i, table in enumerate(tables)]
    remarks = "".join(f"<p class=failure>{html.escape(one)}</p>" for one in content.failures)
    notes = "".join(f"<p class=note>{html.escape(one)}</p>" for one in content.notes)
    left_out = "".join(f"<li>{html.escape(one)}</li>" for one in content.missing)
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(content.title)}</title>
<style>{_STYLE}</style></head>
<body>
<h1>{html.escape(content.title)}</h1>
<p class=lead>{html.escape(content.lead)}</p>
<nav>{links}</nav>
{remarks}
{"".join(results)}
{notes}
<h2 id="pictures">Pictures</h2>
{"".join(_figure(picture, stem) for picture in content.pictures)}
{f"<ul class=note>{left_out}</ul>" if content.missing else ""}
{settings}
</body>
</html>
"""


def _section(anchor: str, table: Table) -> str:
    width = 1 + len(table.columns)
    groups = "".join(f'<th colspan="{len(columns)}">{html.escape(name)}</th>' for name, columns in table.groups)
    head = f"<tr class=groups><th></th>{groups}</tr>" if any(name for name, _ in table.groups) else ""
    firsts = {sum(len(columns) for _, columns in table.groups[:place]) for place in range(len(table.groups))}
    names = "".join(_cell("th", name, place in firsts) for place, name in enumerate(table.columns))
    body = ""
    for row in table.rows:
        if len(row) == 1:
            body += f'<tr class=heading><th colspan="{width}"><span>{html.escape(row[0])}</span></th></tr>\n'
        else:
            cells = "".join(_cell("td", text, place in firsts) for place, text in enumerate(row[1:]))
            body += f"<tr><th>{html.escape(row[0])}</th>{cells}</tr>\n"
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in table.notes)
    kind = "prose" if table.prose else "numbers"
    return (
        f'<h2 id="{anchor}">{html.escape(table.title)}</h2>{notes}\n<div class=scroll><table class={kind}>'
        f"<thead>{head}<tr><th>{html.escape(table.first)}</th>{names}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _cell(tag: str, text: str, first: bool) -> str:
    return f"<{tag}{' class=first' if first else ''}>{html.escape(text)}</{tag}>"


def _figure(picture: Picture, stem: str) -> str:
    image = _inline("image/svg+xml", picture.svg())
    data = _inline("text/csv", picture.csv().encode())
    name = f"{stem}_{picture.name}.csv"
    link = f'<a download="{name}" href="{data}">{name}</a>'
    title = html.escape(picture.title)
    return (
        f'<figure id="{picture.name}"><h3>{title}</h3>\n<img alt="{title}" src="{image}">\n'
        f"<figcaption>{html.escape(picture.caption)} {link}</figcaption></figure>\n"
    )


def _inline(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


_STYLE = """
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 1180px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; } .lead { color: #555; margin: 0 0 .6rem; }
nav { font-size: .9rem; } a { color: #0b5a94; text-decoration: none; } a:hover { text-decoration: underline; }
.note, figcaption { color: #555; font-size: .86rem; max-width: 60rem; margin: .35rem 0; }
ul.note { padding-left: 1.2rem; }
.failure { color: #8a1c00; background: #fff3ee; padding: .4rem .7rem; border-left: 3px solid #d55e00; }
/* a shadow where columns lie outside on the right, covered by white that scrolls along with the last of them */
.scroll { overflow-x: auto; border-bottom: 1px solid #ccc;
  background: linear-gradient(to right, #fff0, #fff) right / 60px 100% no-repeat local,
    linear-gradient(to left, #0005, #0000) right / 16px 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; text-align: right; white-space: nowrap; font-weight: normal; }
thead th { color: #555; border-bottom: 1px solid #ccc; vertical-align: bottom; }
.groups th { color: #1c1c1c; font-weight: 600; text-align: left; border-bottom: none; border-left: 1px solid #e2e2e2; }
.groups th:first-child { border-left: none; } .first { border-left: 1px solid #e2e2e2; }
tr > th:first-child { text-align: left; position: sticky; left: 0; background: #fff; z-index: 1; }
tbody th { font-weight: 600; } tbody tr:hover > * { background: #f6f9fc; }
tbody tr.heading th { background: #f3f4f6; padding-top: .35rem; } .heading span { position: sticky; left: .6rem; }
.prose td { text-align: left; white-space: normal; min-width: 9rem; vertical-align: top; overflow-wrap: anywhere; }
.prose th { vertical-align: top; text-align: left; }
figure { margin: 1.8rem 0; } figure img { max-width: 100%; height: auto; display: block; }
@media print { .scroll { overflow: visible; } figure { break-inside: avoid; } }
"""
