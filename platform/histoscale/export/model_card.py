"""The README of an exported model: what it is, what it was made from, what was measured, and how to load it."""

from collections.abc import Iterator, Sequence

import yaml

from histoscale.augment.colour import IMAGENET_MEAN, IMAGENET_STD
from histoscale.config.archs import ARCHS, Arch
from histoscale.config.decode import OUTSIDE_THE_FINGERPRINT
from histoscale.config.recipe import Recipe
from histoscale.evaluate.figures import PRETRAINED, UNTRAINED
from histoscale.evaluate.intervals import Interval
from histoscale.evaluate.metrics import BALANCED_ACCURACY
from histoscale.evaluate.report import EvaluationReport
from histoscale.export.about import About, without_paths
from histoscale.export.card_snippets import how_to_load
from histoscale.export.marker import Marker
from histoscale.export.parity import MAX_DIFFERENCE, Parity
from histoscale.sampling.report import MagnificationReport, PlanReport
from histoscale.units import describe_mpp

_STRATA_SHOWN = 20


def model_card(recipe: Recipe, marker: Marker, about: About, parity: Parity) -> str:
    """Markdown text whose Python blocks run as they stand in the folder of the export."""
    arch = ARCHS[marker.arch]
    return "\n".join(
        [
            *_front_matter(marker),
            f"# {marker.arch}",
            "",
            *_what_it_is(recipe, marker, arch),
            *_licence(marker, about, recipe),
            *how_to_load(marker, arch),
            *_preprocessing(recipe, marker),
            *_data(marker, about, recipe),
            *_evaluation(marker, about.evaluations),
            *_robustness(about.evaluations),
            *_proof(parity),
            *_health(about),
            *_limits(recipe, about),
            *_provenance(recipe, marker, about),
            "",
        ]
    )


def licence_notice(marker: Marker, about: About, recipe: Recipe) -> str:
    """The text of LICENSE: what was stated, and nothing else."""
    return "\n".join(line.removeprefix("## ") for line in _licence(marker, about, recipe)).strip() + "\n"


def _front_matter(marker: Marker) -> Iterator[str]:
    values: dict[str, object] = {
        "library_name": "timm" if marker.layout == "timm" else "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["pathology", "histopathology", "self-supervised", "vision-transformer"],
    }
    if marker.licence:
        values |= {"license": "other", "license_name": marker.licence}
    yield from ("---", yaml.safe_dump(values, sort_keys=False).rstrip(), "---", "")


def _what_it_is(recipe: Recipe, marker: Marker, arch: Arch) -> Iterator[str]:
    how = "pretrained by self-supervision" if recipe.distill is None else "distilled from a larger network"
    patches = (marker.image_px // arch.patch_px) ** 2
    finished = f"{marker.images_seen:,} of {recipe.schedule.images:,} planned"
    yield f"A vision transformer, {how} on whole-slide images with histoscale: it turns a tile of tissue into an"
    yield "embedding. These are the weights of the moving average of the trained network."
    yield ""
    yield from _table(
        ("", ""),
        [
            ("version", f"`{marker.version}`"),
            ("tiles seen", f"{finished}, in {marker.step:,} optimiser steps"),
            (
                "network",
                f"{arch.depth} blocks of width {arch.width}, {arch.heads} heads, patches of {arch.patch_px} px",
            ),
            ("tokens", f"1 class, {arch.registers} register, {patches} patch tokens, after the final norm"),
            ("embedding", f"class token ++ mean of the patch tokens: {2 * arch.width} numbers"),
        ],
    )


def _licence(marker: Marker, about: About, recipe: Recipe) -> Iterator[str]:
    yield "## Licence"
    yield ""
    yield (
        f"Stated by who exported the model: {marker.licence}"
        if marker.licence
        else "None was stated. Ask those who gave you this model before you use it."
    )
    if recipe.distill is not None and recipe.distill.licence:
        yield ""
        yield f"It was distilled from another model: {recipe.distill.licence}. Those terms may bind this model, too."
    if about.origins:
        yield ""
        yield "What it learnt from beside slides, whose terms may bind it, too:"
        yield ""
        yield from (f"- {line}" for line in about.origins)
    yield ""


def _preprocessing(recipe: Recipe, marker: Marker) -> Iterator[str]:
    side_px = marker.image_px
    scales = ", ".join(describe_mpp(entry.mpp) for entry in recipe.data.mix)
    yield from ("## Preprocessing", "")
    yield f"- **Scale**: trained at {scales}. Cut tiles at one of these scales; another one is another task."
    yield f"- **Size**: {side_px} x {side_px} px: crop to a square, resize bicubically with antialiasing. Other sides"
    yield f"  that are multiples of {ARCHS[marker.arch].patch_px} px work; the position embedding is resampled"
    yield "  bicubically with antialiasing."
    yield f"- **Colour**: RGB in [0, 1], mean {IMAGENET_MEAN}, standard deviation {IMAGENET_STD}."
    yield "  No stain normalisation."
    yield ""


def _data(marker: Marker, about: About, recipe: Recipe) -> Iterator[str]:
    yield from ("## Data", "")
    slides = "unknown: the index could not be read" if about.slides is None else f"{about.slides:,}"
    rows = [
        ("slides in the index", slides),
        ("index snapshot", f"`{marker.snapshot or 'unknown'}`"),
        ("slides left out in training, as they could not be read", f"{about.left_out:,}"),
        ("tiles seen", f"{marker.images_seen:,}"),
    ]
    yield from _table(("", ""), rows)
    if about.plan is not None:
        yield from _mixture(about.plan)
    else:
        shares = [(describe_mpp(entry.mpp), f"{entry.share:g}") for entry in recipe.data.mix]
        yield from _table(("magnification", "weight"), shares)


def _mixture(plan: PlanReport) -> Iterator[str]:
    yield "Shares of all tiles; slides that serve a magnification, of which a run visits as many as its length allows."
    yield ""
    rows: list[Sequence[str]] = []
    for scale in plan.magnifications:
        rows.append((_scale(scale), "all", f"{scale.share:.1%}", f"{scale.slides:,}"))
        strata = scale.strata if len(scale.strata) > 1 else ()
        rows += [
            ("", stratum.name, f"{scale.share * stratum.share:.1%}", f"{stratum.slides:,}")
            for stratum in strata[:_STRATA_SHOWN]
        ]
        if len(strata) > _STRATA_SHOWN:
            rest = sum(stratum.share for stratum in strata[_STRATA_SHOWN:])
            rows.append(("", f"{len(strata) - _STRATA_SHOWN} more", f"{scale.share * rest:.1%}", ""))
    yield from _table(("magnification", "stratum", "share", "slides"), rows)


def _evaluation(marker: Marker, reports: Sequence[EvaluationReport]) -> Iterator[str]:
    yield from ("## Evaluation", "")
    if not reports:
        yield from ("None was made before this export.", "")
        return
    yield "Balanced accuracy in percent with its 95 % interval; the untrained network is the same one before its first"
    yield "step. Where the interval of the gain holds 0, the gain is not established."
    yield ""
    rows = [row for report in reports for row in _figures(report)]
    yield from _table(("dataset", "step", "probe", "embedding", "accuracy", "chance", "untrained", "gain"), rows)
    if any(report.step != marker.step for report in reports):
        yield from (f"Those of another step than {marker.step:,} are of an earlier checkpoint of the same run.", "")
    for report in reports:
        tiles = f"{sum(report.counts.values()):,} tiles in {len(report.counts)} classes"
        yield f"- {report.dataset}: {tiles}; {report.division}"
        yield from (f"- {report.dataset}: {without_paths(note)}" for note in report.notes)
    yield ""


def _figures(report: EvaluationReport) -> Iterator[Sequence[str]]:
    for figure in report.figures:
        if (figure.features, figure.metric) != (PRETRAINED, BALANCED_ACCURACY):
            continue
        gain = next(
            (
                f"{100 * gain.difference:+.1f} [{_interval(gain.interval, '+.1f')}]"
                for gain in report.gains
                if (gain.baseline, gain.embedding, gain.probe, gain.metric)
                == (UNTRAINED, figure.embedding, figure.probe, BALANCED_ACCURACY)
            ),
            "",
        )
        untrained = report.figure(UNTRAINED, figure.probe, embedding=figure.embedding)
        yield (
            report.dataset,
            f"{report.step:,}",
            figure.probe,
            figure.embedding,
            f"{100 * figure.mean:.1f} [{_interval(figure.interval)}]",
            f"{100 / len(report.counts):.1f}",
            f"{100 * untrained.mean:.1f}",
            gain,
        )


def _robustness(reports: Sequence[EvaluationReport]) -> Iterator[str]:
    yield from ("## Robustness against the center", "")
    rows = [
        (
            report.dataset,
            each.embedding,
            f"{each.index:.3f} [{each.index_interval[0]:.3f}, {each.index_interval[1]:.3f}]",
            f"{100 * each.center_accuracy:.1f} % [{_interval(each.center_interval)}]",
            f"{100 * each.center_chance:.1f} %",
        )
        for report in reports
        for each in report.robustness
        if each.features == PRETRAINED
    ]
    if not rows:
        yield from ("Not measured: no evaluation was made on a dataset that names the centers of its tiles.", "")
        return
    yield "The robustness index is 1 where tissue alone decides what is near, 0 where the center does. A center that"
    yield "can be told from the embedding may be learnt in place of the disease."
    yield ""
    yield from _table(("dataset", "embedding", "robustness index", "center told", "by chance"), rows)


def _proof(parity: Parity) -> Iterator[str]:
    yield from ("## Proof", "")
    yield "The weights of this folder in other implementations, beside the network that was trained, over"
    yield f"{parity.tiles} tiles: {parity.source}. In fp32 no token may differ by more than {MAX_DIFFERENCE:g}, or"
    yield "nothing is exported; in bf16 both networks round on their own. The second size shows that position"
    yield "embeddings are resampled alike."
    yield ""
    rows = [
        (
            row.implementation,
            row.precision,
            str(row.image_px),
            row.tokens,
            f"{row.largest:.1e}",
            f"{row.relative:.1e}",
            f"{row.cosine:.7f}",
        )
        for row in parity.rows
    ]
    heads = ("implementation", "precision", "px", "tokens", "largest difference", "relative", "smallest cosine")
    yield from _table(heads, rows)
    yield from (f"{note}." for note in parity.notes)
    yield from ("The same figures: `parity.json`.", "")


def _health(about: About) -> Iterator[str]:
    yield from ("## Health of the run", "")
    if about.health is None:
        yield from ("The run has no metrics.", "")
        return
    rows = [(name, f"{value:.4g}") for name, value in about.health.items()]
    yield from _table(("mean of the last steps", ""), rows)
    yield "`health/mean_cosine` is that between the class tokens of different tiles: near 1, the network has collapsed."
    yield from (f"Alarm at {line}." for line in about.alarms)
    if not about.alarms:
        yield "No alarm rang."
    yield ""


def _limits(recipe: Recipe, about: About) -> Iterator[str]:
    yield from ("## Limits", "")
    yield "- Not for clinical use, and not validated for any diagnosis."
    yield "- Whether it may be used, and for what, is for those to say whose slides it was trained on."
    yield "- Stains, scanners and scales that are not in the mixture above were not seen."
    if about.plan is not None and not recipe.data.balance:
        yield "- Sites and scanners were not balanced: those with many slides decide most of what was learnt."
    if not any(report.robustness for report in about.evaluations):
        yield "- How much the embedding tells of the center was not measured."
    yield ""


def _provenance(recipe: Recipe, marker: Marker, about: About) -> Iterator[str]:
    yield from ("## Provenance", "")
    yield f"- recipe `{marker.recipe}`, step {marker.step:,}, index snapshot `{marker.snapshot or 'unknown'}`"
    if marker.teacher:
        yield f"- frozen teacher `{marker.teacher}`"
    yield from (f"- {line}" for line in about.code)
    yield ""
    yield "<details><summary>The resolved recipe, places left out</summary>"
    yield from ("", "```yaml", shown_recipe(recipe).rstrip(), "```", "", "</details>")


def shown_recipe(recipe: Recipe) -> str:
    """The fields that the fingerprint names, as YAML, with the last name of each path in place of the whole."""
    values = recipe.model_dump(mode="json", exclude=set(OUTSIDE_THE_FINGERPRINT))
    if recipe.model.weights is not None:
        values["model"]["weights"] = without_paths(recipe.model.weights, [recipe.model.weights])
    if recipe.distill is not None:
        values["distill"]["teacher"] = without_paths(recipe.distill.teacher, [recipe.distill.teacher])
    return yaml.safe_dump(values, sort_keys=False)


def _scale(scale: MagnificationReport) -> str:
    if scale.mpp == scale.coarsest_mpp:
        return describe_mpp(scale.mpp)
    return describe_mpp((scale.mpp, scale.coarsest_mpp))


def _interval(interval: Interval, form: str = ".1f") -> str:
    return ", ".join(f"{100 * bound:{form}}" for bound in interval)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    yield from ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    yield ""
