"""The frozen teacher of a distilled run, ready to look at crops, and what its students are.

The first rank alone reads it, and gives the others what it found: they all have the same teacher, whatever becomes of
its run meanwhile, and it is fetched once.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from histoscale.checkpoint.collective import on_first_rank, receive
from histoscale.checkpoint.reader import load_teacher
from histoscale.config.archs import ARCHS
from histoscale.config.recipe import DistillSection, Recipe
from histoscale.errors import ModelError
from histoscale.models import SSLNet, VisionTransformer, build_ssl_net
from histoscale.models.feature_net import build_feature_net
from histoscale.models.published import load_published
from histoscale.storage import open_store
from histoscale.train.engine import compute_dtype
from histoscale.train.features import FeatureObjective, Features
from histoscale.train.objective import Objective, PrototypeObjective
from histoscale.train.step import all_reduce
from histoscale.train.teacher_source import TeacherRun, TeacherWeights, find_teacher, require_same_targets

Network = TypeVar("Network", bound=nn.Module)
Weights = dict[str, Tensor]


class FrozenTeacher(Protocol):
    """A network that only looks, and what its students are.

    Attributes:
        fingerprint: Names its weights.
    """

    fingerprint: str

    def pupil(self, recipe: Recipe) -> tuple[nn.Module, Objective[Any]]:
        """A student with its initial weights on the CPU, and what it minimises.

        Raises:
            RecipeError: The recipe's student cannot learn from this teacher.
        """


def load_frozen_teacher(recipe: Recipe, distill: DistillSection, device: torch.device) -> FrozenTeacher:
    """The teacher that a recipe names, in the dtype that the student computes in (collective).

    Raises:
        HistoscaleError: It cannot be reached or read, or does not fit; raised on every rank.
    """
    source = on_first_rank(lambda: find_teacher(recipe, distill))
    dtype = compute_dtype(recipe, device)
    if isinstance(source, TeacherRun):
        return HeadsTeacher(source, device, dtype)
    return FeaturesTeacher(source, distill, recipe.crops.global_px, device, dtype)


class HeadsTeacher:
    """The average of a run of ours: students predict its assignments to prototypes.

    Attributes:
        network: Backbone and heads, frozen.
        fingerprint: Names recipe, step and weights.
    """

    def __init__(self, source: TeacherRun, device: torch.device, dtype: torch.dtype) -> None:
        self._recipe = source.recipe
        self.network = _frozen(lambda: SSLNet(source.recipe), device, dtype)
        self.fingerprint = receive(self.network, lambda: _read_run(source, self.network))

    @torch.no_grad()
    def __call__(self, global_crops: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Outputs of `SSLNet` for whole global crops; `mask` says which patches to project."""
        outputs: dict[str, Tensor] = self.network(global_crops, None, mask, hide_masked=False)
        return outputs

    def pupil(self, recipe: Recipe) -> tuple[nn.Module, Objective[Any]]:
        """A network with heads, and the objective of pretraining with nothing hidden; see `FrozenTeacher`."""
        require_same_targets(recipe, self._recipe)
        return build_ssl_net(recipe), PrototypeObjective(recipe, self, all_reduce, hide_masked=False)


class FeaturesTeacher:
    """A backbone whose tokens students imitate.

    Args:
        source: Its weights.
        distill: What its students' losses weigh.
        image_px: Side of the students' global crops.
        device: Where it runs.
        dtype: What it computes in.

    Attributes:
        network: The backbone, frozen.
        fingerprint: Names its weights.
    """

    def __init__(
        self, source: TeacherWeights, distill: DistillSection, image_px: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        arch = ARCHS[source.arch]
        self._width, self._distill = arch.width, distill
        self.network = _frozen(lambda: VisionTransformer(arch, image_px, qk_norm=source.qk_norm), device, dtype)
        self.fingerprint = receive(self.network, lambda: _read_weights(source, image_px))

    @torch.no_grad()
    def __call__(self, global_crops: Tensor) -> Features:
        """Class token and patches after the final norm."""
        tokens = self.network(global_crops)
        return Features(tokens[:, 0], tokens[:, self.network.prefix_tokens :])

    def pupil(self, recipe: Recipe) -> tuple[nn.Module, Objective[Any]]:
        """A network with projectors, and cosine distance; see `FrozenTeacher`."""
        return build_feature_net(recipe, self._width), FeatureObjective(recipe, self._distill, self)


def _frozen(build: Callable[[], Network], device: torch.device, dtype: torch.dtype) -> Network:
    """A network whose weights are still to come."""
    with torch.device("meta"):
        network = build().to(dtype)
    return network.to_empty(device=device).requires_grad_(False).eval()


def _read_run(source: TeacherRun, network: nn.Module) -> tuple[Weights, str]:
    weights = load_teacher(open_store(source.uri), source.commit)
    _require_fit(weights, network)
    return weights, source.fingerprint()


def _read_weights(source: TeacherWeights, image_px: int) -> tuple[Weights, str]:
    try:
        loaded = load_published(source.uri, ARCHS[source.arch], image_px, source.qk_norm)
    except ModelError as error:
        remedy = error.remedy and error.remedy.replace("model.arch", "distill.arch")
        raise ModelError(error.what, value=error.value, expected=error.expected, remedy=remedy) from error
    if source.sha256 not in (None, loaded.sha256):
        raise ModelError(
            f"the teacher's weights at {source.uri} are not those of its export",
            value=loaded.sha256,
            expected=f"SHA-256 {source.sha256}",
            remedy="export the run again",
        )
    return loaded.state, f"sha256:{loaded.sha256}"


def _require_fit(weights: Weights, network: nn.Module) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            raise ModelError(
                f"the teacher's weights are of another network than its recipe says, at {name}",
                value=found.get(name, "nothing"),
                expected=str(wanted.get(name, "nothing")),
                remedy="use the version of histoscale that trained it",
            )
