"""A self-contained HTML page: escaped text, SVG charts, embedded pictures.

Every text in a tag is escaped, since file names come from strangers. The page
needs no network and no JavaScript, follows the reader's light or dark mode, and
fits a phone.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_VOID = ("br", "img", "meta", "rect", "line", "polyline", "circle")


class Html(str):
  """Text that is already HTML; `tag` creates it."""

  __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
  """Returns an element; children that are not Html are escaped.

  Args:
    name: name of the element.
    *children: Html, or values to convert to text.
    **attributes: attributes; a trailing underscore is dropped (`class_`), other
      underscores become hyphens (`text_anchor`).
  """
  inner = "".join(
    child if isinstance(child, Html) else _text(child) for child in children
  )
  parts = [name]
  for key, value in attributes.items():
    key = key.rstrip("_").replace("_", "-")
    parts.append(f'{key}="{_text(value)}"')
  if name in _VOID and not children:
    return Html(f"<{' '.join(parts)}/>")
  return Html(f"<{' '.join(parts)}>{inner}</{name}>")


def _text(value: object) -> str:
  text = html.escape(str(value))
  # A lone surrogate from a damaged ledger cannot be written as UTF-8.
  return text.encode(errors="backslashreplace").decode()


def file_name(text: object) -> Html:
  """Returns a name whose text direction does not affect its surroundings."""
  return tag("bdi", text, class_="name")


def page(title: str, *children: Html) -> str:
  """Returns the complete HTML file."""
  head = tag(
    "head",
    tag("meta", charset="utf-8"),
    tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
    tag("meta", name="color-scheme", content="light dark"),
    # A second defence: the browser loads and runs nothing.
    tag(
      "meta",
      http_equiv="Content-Security-Policy",
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    ),
    tag("title", title),
    Html(f"<style>{_STYLE}</style>"),
  )
  body = tag("body", tag("main", tag("h1", title), *children))
  return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def section(title: str, *children: Html) -> Html:
  """Returns a section with a heading."""
  return tag("section", tag("h2", title), *children)


def table(
  header: Sequence[object],
  rows: Iterable[Sequence[object]],
  *,
  stacked: bool = False,
) -> Html:
  """Returns a table; the first column holds names, the others numbers.

  Args:
    header: names of the columns.
    rows: cells.
    stacked: on a phone the cells of a row stand below each other, each with the
      name of its column; otherwise a wide table scrolls.
  """
  head = tag("tr", *(tag("th", cell) for cell in header))
  body = []
  for name, *cells in rows:
    columns = zip(header[1:], cells, strict=True)
    numbers = (
      tag("td", cell, **({"data_name": column} if stacked else {}))
      for column, cell in columns
    )
    body.append(tag("tr", tag("th", name, scope="row"), *numbers))
  inner = tag("table", tag("thead", head), tag("tbody", *body))
  return tag("div", inner, class_="wide stacked" if stacked else "wide")


def share_bar(share: float, colour: str = "var(--bar)") -> Html:
  """Returns a share in [0, 1] as a number and a bar."""
  width = f"{100 * min(max(share, 0), 1):.1f}%"
  bar = tag("i", style=f"width:{width};background:{colour}")
  return tag(
    "span",
    tag("span", bar, class_="track"),
    tag("span", percent(share), class_="number"),
    class_="share",
  )


def percent(share: float) -> str:
  """Returns a share as text: '0.03%', '4.2%', '57%'."""
  value = 100 * share
  digits = 0 if value >= 10 or value == 0 else 1 if value >= 1 else 2
  return f"{value:.{digits}f}%"


def swatch(rgb: Sequence[int]) -> Html:
  """Returns a small square of a colour, RGB in [0, 255]."""
  colour = "rgb({},{},{})".format(*(int(c) for c in rgb))
  return tag("i", class_="swatch", style=f"background:{colour}")


def picture(pixels: np.ndarray, caption: Html, text: str) -> Html:
  """Returns a figure with an embedded JPEG.

  Args:
    pixels: uint8 (H, W, 3), RGB.
    caption: text below it.
    text: describes the picture where it cannot be seen.
  """
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "JPEG", quality=82)
  data = base64.b64encode(file.getvalue()).decode()
  height, width = pixels.shape[:2]
  image = tag(
    "img",
    src=f"data:image/jpeg;base64,{data}",
    width=width,
    height=height,
    alt=text,
  )
  return tag("figure", image, tag("figcaption", caption))


# --- Charts -------------------------------------------------------------------

_WIDTH, _HEIGHT, _BOTTOM = 320, 150, 22
# Room for numbers beside curves.
_LEFT = 44
# Larger values are counted in the last bin.
_TOP_QUANTILE = 0.99
_MOST_BINS = 24


def histogram(
  title: str,
  values: np.ndarray,
  unit: str = "",
  limits: tuple[float, float] | None = None,
  marker: float | None = None,
) -> Html:
  """Returns a histogram as SVG, with the quantiles as caption.

  Args:
    title: heading of the chart.
    values: finite numbers (N,), N > 0.
    unit: unit of the numbers, appended to them.
    limits: ends of the axis; by default from 0 to beyond most values.
    marker: a number to mark with a dashed line.
  """
  values = np.asarray(values, np.float64)
  low, high, num = _bins(values) if limits is None else (*limits, 20)
  step = (high - low) / num
  clipped = np.clip(values, low, np.nextafter(high, low))
  counts, _ = np.histogram(clipped, bins=num, range=(low, high))
  bar = _WIDTH / num
  plot = _HEIGHT - _BOTTOM
  shapes = []
  for i, count in enumerate(counts):
    height = plot * 0.94 * count / counts.max()
    first, last = low + i * step, low + (i + 1) * step
    label = f"{first:.4g} to {last:.4g}{unit}: {count}"
    shapes.append(
      tag(
        "rect",
        tag("title", label),
        x=f"{i * bar + 0.5:.2f}",
        y=f"{plot - height:.2f}",
        width=f"{max(bar - 1, 0.5):.2f}",
        height=f"{height:.2f}",
      )
    )
  if marker is not None and low < marker < high:
    x = f"{(marker - low) / (high - low) * _WIDTH:.2f}"
    shapes.append(tag("line", x1=x, x2=x, y1=0, y2=plot, class_="marker"))
  axis = [tag("line", x1=0, x2=_WIDTH, y1=plot, y2=plot)]
  for i, anchor in enumerate(("start", "middle", "end")):
    at = low + (high - low) * i / 2
    plus = "+" if i == 2 and values.max() > high else ""
    axis.append(
      tag(
        "text",
        f"{at:.4g}{plus}{unit}",
        x=_WIDTH * i / 2,
        y=_HEIGHT - 6,
        text_anchor=anchor,
      )
    )
  caption = _quantiles(values, unit)
  svg = tag(
    "svg",
    *shapes,
    *axis,
    viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
    role="img",
    aria_label=f"{title}: {caption}",
  )
  return tag(
    "figure",
    tag("h3", title),
    svg,
    tag("figcaption", caption),
    class_="chart",
  )


def _bins(values: np.ndarray) -> tuple[float, float, int]:
  """Returns lowest edge, highest edge and number of bins.

  Steps are 1, 2 or 5 times a power of ten. The largest 1 % of the values, and
  the smallest 1 % below 0, may lie beyond the edges.
  """
  low, high = np.quantile(values, [1 - _TOP_QUANTILE, _TOP_QUANTILE])
  low, high = min(low, 0.0), max(high, 0.0)
  step = _round_step((high - low) / _MOST_BINS or 1.0)
  first, last = np.floor(low / step), np.floor(high / step) + 1
  return float(first * step), float(last * step), int(last - first)


def _quantiles(values: np.ndarray, unit: str) -> str:
  if values.min() == values.max():
    return f"{values[0]:.3g}{unit}, all of {len(values)}"
  low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
  return (
    f"median {median:.3g}{unit}; 90% from {low:.3g} to {high:.3g}; "
    f"all from {values.min():.3g} to {values.max():.3g}"
  )


class Curve(NamedTuple):
  """A curve of a chart.

  Attributes:
    name: name in the legend.
    x: finite numbers (N,) in rising order, N > 0.
    y: finite numbers (N,).
  """

  name: str
  x: np.ndarray
  y: np.ndarray


def lines(
  title: str, curves: Sequence[Curve], x_name: str, *, is_log: bool = False
) -> Html:
  """Returns curves over a shared axis as SVG, with their last values.

  Of a curve with more points than the chart has pixels, means of neighbouring
  points are drawn.

  Args:
    title: heading of the chart.
    curves: at most 6.
    x_name: what the horizontal axis counts.
    is_log: use a logarithmic axis if all values are positive and span a factor
      of ten.
  """
  values = np.concatenate([curve.y for curve in curves]).astype(np.float64)
  places = np.concatenate([curve.x for curve in curves]).astype(np.float64)
  is_log = is_log and values.min() > 0 and values.max() > 10 * values.min()
  low, high, ticks = _ticks(values.min(), values.max(), is_log)
  first, last = places.min(), places.max()
  plot = _HEIGHT - _BOTTOM

  def across(x: np.ndarray) -> np.ndarray:
    share = (x - first) / ((last - first) or 1.0)
    return _LEFT + (_WIDTH - _LEFT) * share

  def down(y: np.ndarray) -> np.ndarray:
    y, ends = (np.log(y), np.log([low, high])) if is_log else (y, (low, high))
    return 4 + (plot - 8) * (1 - (y - ends[0]) / (ends[1] - ends[0]))

  shapes = []
  for value in ticks:
    y = f"{float(down(value)):.2f}"
    grid = tag("line", x1=_LEFT, x2=_WIDTH, y1=y, y2=y, class_="grid")
    text = f"{value:.4g}"
    at = {"x": _LEFT - 4, "y": float(y) + 4, "text_anchor": "end"}
    shapes += [grid, tag("text", text, **at)]
  for i, curve in enumerate(curves):
    x, y = _thinned(np.float64(curve.x), np.float64(curve.y))
    points = " ".join(
      f"{a:.1f},{b:.1f}" for a, b in zip(across(x), down(y), strict=True)
    )
    label = tag("title", f"{curve.name}: {curve.y[-1]:.4g}")
    shapes.append(
      tag("circle", label, cx=points.split(",")[0], cy=f"{down(y)[0]:.1f}", r=2)
      if len(x) == 1
      else tag("polyline", label, points=points, class_=f"curve c{i}")
    )
  shapes.append(tag("line", x1=_LEFT, x2=_WIDTH, y1=plot, y2=plot))
  for x, anchor, at in ((_LEFT, "start", first), (_WIDTH, "end", last)):
    text = f"{x_name} {at:,.0f}"
    shapes.append(tag("text", text, x=x, y=_HEIGHT - 6, text_anchor=anchor))
  rows = [
    tag(
      "span",
      tag("i", class_=f"swatch s{i}"),
      f"{curve.name} {curve.y[-1]:.4g}",
    )
    for i, curve in enumerate(curves)
  ]
  return tag(
    "figure",
    tag("h3", title),
    tag(
      "svg",
      *shapes,
      viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
      role="img",
      aria_label=", ".join(f"{c.name}: last {c.y[-1]:.4g}" for c in curves),
    ),
    tag("figcaption", *rows, class_="legend"),
    class_="chart",
  )


def _ticks(
  low: float, high: float, is_log: bool
) -> tuple[float, float, list[float]]:
  """Returns both ends of an axis that holds the values, and numbers on it."""
  if is_log:
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
    ticks = [f * power for power in powers for f in (1, 2, 5)]
    inside = [t for t in ticks if low <= t <= high]
    return low, high, inside[:: -(-len(inside) // 5) or 1]
  step = _round_step((high - low) / 4 or abs(high) or 1.0)
  low, high = np.floor(low / step) * step, np.ceil(high / step) * step
  high = high if high > low else low + step
  count = round((high - low) / step)
  return float(low), float(high), [float(low + i * step) for i in range(count)]


def _round_step(rough: float) -> float:
  """Returns the least of 1, 2 and 5 times powers of ten, at least `rough`."""
  power = 10.0 ** np.floor(np.log10(rough))
  return float(next(f * power for f in (1, 2, 5, 10) if f * power >= rough))


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  parts = np.array_split(np.arange(len(x)), min(len(x), _WIDTH))
  return (
    np.array([x[part].mean() for part in parts]),
    np.array([y[part].mean() for part in parts]),
  )


_STYLE = """
:root{--paper:#fff;--ink:#1c2024;--quiet:#5b6570;--line:#d9dee3;--card:#f5f7f9;
--bar:#2f6fb5;--marker:#b5382f;--green:#2e7d4f;--violet:#7a4fb0;--ochre:#a8700c}
@media (prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e9ec;
--quiet:#a0a9b2;--line:#333a41;--card:#1d2226;--bar:#6ea8e6;--marker:#ff8a80;--green:#6fcf97;--violet:#c3a2f2;
--ochre:#e3b341}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem;padding-top:.75rem;
border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.25rem 0 .25rem}
figure h3{margin-top:0}
p{margin:.5rem 0;max-width:75ch}
p,figcaption,.quiet{color:var(--quiet)}
figcaption{font-size:.82rem;line-height:1.35;overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.3rem .6rem;text-align:right;vertical-align:top;
border-bottom:1px solid var(--line);font-weight:400}
thead th{color:var(--quiet);font-size:.85rem;vertical-align:bottom}
th:first-child{text-align:left}
tbody th{overflow-wrap:anywhere;min-width:8rem}
td{white-space:nowrap}
small{color:var(--quiet)}
.differs{color:var(--marker);font-weight:600}
.charts,.crops{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr))}
.charts{margin:.75rem 0}
figure{margin:0;background:var(--card);border-radius:8px;padding:.75rem;
min-width:0}
.crops figure{padding:0;overflow:hidden}
.crops figcaption{padding:.4rem .6rem .5rem}
img{display:block;width:100%;height:auto}
svg{display:block;width:100%;height:auto}
svg rect{fill:var(--bar)}
svg line{stroke:var(--quiet)}
svg .marker{stroke:var(--marker);stroke-dasharray:4 3}
svg .grid{stroke:var(--line)}
svg .curve{fill:none;stroke-width:1.5;stroke-linejoin:round}
.c0{stroke:var(--bar)}.c1{stroke:var(--marker)}.c2{stroke:var(--green)}
.c3{stroke:var(--violet)}.c4{stroke:var(--ochre)}.c5{stroke:var(--quiet)}
.s0{background:var(--bar)}.s1{background:var(--marker)}
.s2{background:var(--green)}.s3{background:var(--violet)}
.s4{background:var(--ochre)}.s5{background:var(--quiet)}
svg text{fill:var(--quiet);font-size:11px}
.share{display:flex;align-items:center;gap:.5rem}
.share .number{flex:none;width:3.2rem}
.track{flex:1;height:.5rem;min-width:3rem;background:var(--line);
border-radius:3px;overflow:hidden}
.track i{display:block;height:100%}
.swatch{display:inline-block;width:.9em;height:.9em;border-radius:3px;
border:1px solid var(--quiet);vertical-align:-.1em;margin-right:.4em}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.5rem 0;
font-size:.85rem}
.name{font-family:ui-monospace,monospace;font-size:.9em;overflow-wrap:anywhere}
ul{margin:.25rem 0;padding-left:1.2rem}
@media (max-width:600px){
main{padding:.75rem}
table{font-size:.88rem}
th,td{padding:.3rem .3rem}
tbody th{min-width:4.5rem}
.share{justify-content:flex-end}
.share .number{width:auto}
.track{display:none}
.stacked thead{display:none}
.stacked table,.stacked tbody,.stacked tr,.stacked th,.stacked td{
display:block;text-align:left}
.stacked td{padding-left:1rem;white-space:normal}
.stacked td::before{content:attr(data-name);display:block;color:var(--quiet);
font-size:.85rem;overflow-wrap:anywhere}
}
"""
