"""The page on the tiles of one step: what each of them is, and how the step's values compare with those around it."""

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from histoscale.observe.tile_pictures import spread_over
from histoscale.sampling.gallery import Mpp, place_of
from histoscale.slides.report_charts import page
from histoscale.stream.seen_tiles import SeenTile
from histoscale.units import describe_mpp

MOST_TILES = 256
_TILE_PX = 150
_QUALITY = 75
_AROUND = 25  # steps on either side


def step_page(
    step: int, tiles: Sequence[SeenTile], tiles_of_step: int, mix: Sequence[Mpp], metrics: Sequence[Mapping[str, float]]
) -> str:
    """The page as HTML that loads nothing.

    Args:
        step: The step.
        tiles: Those of it that are shown.
        tiles_of_step: How many it had.
        mix: Magnifications of the recipe.
        metrics: What was measured of the steps, steps ascending.
    """
    sections = [("Its values, and those of the steps around it", _values(step, metrics))]
    for place, mpp in enumerate(mix):
        figures = [_figure(tile) for tile in tiles if place_of(tile.plan.mpp, mix) == place]
        if figures:
            sections.append(
                (f"{escape(describe_mpp(mpp))}: {len(figures)} tiles", f'<div class="sheet">{"".join(figures)}</div>')
            )
    left_out = tiles_of_step - len(tiles)
    if left_out:
        sections.append(
            (
                "Not shown",
                f"<p>{left_out:,} tiles: of a large step, only {MOST_TILES} are shown, evenly chosen; so are none of "
                "slides that were withdrawn, that cannot be read now, or that would have to be fetched as a whole.</p>",
            )
        )
    facts = [("step", f"{step:,}"), ("tiles of it", f"{tiles_of_step:,}"), ("shown here", f"{len(tiles):,}")]
    facts.append(("slides shown", f"{len({tile.slide_id for tile in tiles}):,}"))
    return page(f"Step {step:,}", "The tiles that this step learned from, by their slide's id.", facts, sections)


def chosen(count: int) -> list[int]:
    """Which of the tiles of a step are shown."""
    return spread_over(count, MOST_TILES)


def data_uri(image: Image.Image, quality: int = _QUALITY) -> str:
    """A picture that a page holds itself."""
    data = io.BytesIO()
    image.save(data, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _values(step: int, metrics: Sequence[Mapping[str, float]]) -> str:
    here = next((line for line in metrics if int(line["step"]) == step), None)
    if here is None:
        return "<p>The run has no values of this step.</p>"
    around = [line for line in metrics if 0 < abs(int(line["step"]) - step) <= _AROUND]
    rows = []
    for name, value in here.items():
        others = [line[name] for line in around if name in line]
        if name == "step" or not others:
            continue
        typical = statistics.median(others)
        ratio = f"{value / typical:.2f}" if typical else ""
        cells = (name, f"{value:.5g}", f"{typical:.5g}", f"{min(others):.5g} to {max(others):.5g}", ratio)
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = ("value", "at this step", "median around", "range around", "this over median")
    head = "".join(f"<th>{name}</th>" for name in heads)
    note = f"<p>Around: up to {_AROUND} steps before and after. Losses and the gradient norm tell of spikes.</p>"
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>{note}"


def _figure(tile: SeenTile) -> str:
    small = Image.fromarray(tile.pixels).resize((_TILE_PX, _TILE_PX), Image.Resampling.LANCZOS)
    plan = tile.plan
    text = (
        f"sample {plan.sample_id}<br>slide {escape(tile.slide_id)}<br>{plan.mpp:.4g} um/px at "
        f"({plan.x_px0:,.0f}, {plan.y_px0:,.0f}) px of level 0"
    )
    caption = f'<figcaption style="overflow-wrap:anywhere">{text}</figcaption>'
    return f'<figure><img alt="tile" src="{data_uri(small)}">{caption}</figure>'
