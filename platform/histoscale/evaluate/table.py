"""The findings of an evaluation as text, at most 100 columns wide."""

from collections.abc import Iterator, Sequence

from histoscale.evaluate.figures import COLOUR, NO_EMBEDDING, PRETRAINED, Figure, Gain, Robustness
from histoscale.evaluate.intervals import Interval
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.probes import PROBES

WIDTH = 100
_FIRST, _SECOND, _CELL = 15, 27, 28
_EMBEDDING_TITLES = {
    "cls": "class token",
    "patch_mean": "mean of patch tokens",
    "both": "class token ++ mean of patch tokens",
}


def figures_table(figures: Sequence[Figure], gains: Sequence[Gain]) -> Iterator[str]:
    """Balanced accuracies: a block per kind of embedding, a row per probe and model."""
    shown = [figure for figure in figures if figure.metric == BALANCED_ACCURACY]
    for embedding in dict.fromkeys(figure.embedding for figure in shown if figure.features == PRETRAINED):
        yield f"embedding {embedding}: {_EMBEDDING_TITLES[embedding]}"
        yield _line("probe", "model", "accuracy [95 %]", f"{PRETRAINED} above by [95 %]")
        for figure in shown:
            if figure.embedding in (embedding, NO_EMBEDDING):
                cells = [
                    _signed(gain.difference, gain.interval)
                    for gain in gains
                    if (gain.baseline, gain.embedding, gain.probe, gain.metric)
                    == (figure.features, embedding, figure.probe, figure.metric)
                ]
                title = PROBES[figure.probe].title if figure.features == PRETRAINED else ""
                yield _line(title, figure.features, _bounded(figure.mean, figure.interval), *cells)


def robustness_table(found: Sequence[Robustness]) -> Iterator[str]:
    """What tells of the centers: a row per embedding and model."""
    if not found:
        return
    first = found[0]
    yield (
        f"centers: {first.tiles} balanced tiles, {first.neighbours} neighbours; "
        f"chance {100 * first.index_chance:.1f} for the index, {100 * first.center_chance:.1f} for the center"
    )
    yield _line("embedding", "model", "index, high is good", "center told, low is")
    for each in found:
        yield _line(
            "" if each.features == COLOUR else each.embedding,
            each.features,
            _bounded(each.index, each.index_interval),
            _bounded(each.center_accuracy, each.center_interval),
        )


def percent(figure: Figure) -> str:
    """A share as people read it: `93.1 +- 1.2 %`."""
    return f"{100 * figure.mean:.1f} +- {100 * figure.std:.1f} %"


def _line(first: str, second: str, *cells: str) -> str:
    return (f"{first:<{_FIRST}} {second[:_SECOND]:<{_SECOND}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)).rstrip()


def _bounded(value: float, interval: Interval) -> str:
    return f"{100 * value:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _signed(value: float, interval: Interval) -> str:
    return f"{100 * value:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
