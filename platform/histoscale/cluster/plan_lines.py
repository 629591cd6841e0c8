"""What a run will draw from where, as lines for a person to read before it starts."""

from collections.abc import Iterator

from histoscale.sampling.report import MagnificationReport, PlanReport
from histoscale.units import describe_mpp

_STRATA_SHOWN = 12


def describe_plan(report: PlanReport) -> Iterator[str]:
    """Magnifications, their strata, and which value of each column serves which magnification."""
    for scale in report.magnifications:
        yield (
            f"{_scale(scale)}: {scale.share:.0%} of the tiles, {scale.slides:,} slides serve it, "
            f"{scale.tiles / scale.slides:,.3g} tiles a slide"
        )
        if len(scale.strata) > 1:
            for stratum in scale.strata[:_STRATA_SHOWN]:
                yield (
                    f"  {stratum.name}: {stratum.share:.1%}, {stratum.slides:,} slides of {stratum.patients:,} "
                    f"patients, {stratum.tiles_per_slide:,.3g} tiles a slide, up to {stratum.most_tiles_per_slide:,.3g}"
                )
            if len(scale.strata) > _STRATA_SHOWN:
                yield f"  and {len(scale.strata) - _STRATA_SHOWN} more strata"
    scales = " | ".join(_scale(scale) for scale in report.magnifications)
    for column, served in report.serves.items():
        yield f"slides of each {column} that serve {scales}"
        for value, counts in list(served.items())[:_STRATA_SHOWN]:
            yield f"  {value}: " + " | ".join(f"{count:,}" for count in counts)
        if len(served) > _STRATA_SHOWN:
            yield f"  and {len(served) - _STRATA_SHOWN} more"


def _scale(scale: MagnificationReport) -> str:
    if scale.mpp == scale.coarsest_mpp:
        return describe_mpp(scale.mpp)
    return describe_mpp((scale.mpp, scale.coarsest_mpp))
