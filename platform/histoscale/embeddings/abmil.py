"""Attention-based multiple-instance learning: one label for a bag of tiles, and how much each tile counted.

Gated attention of Ilse, Tomczak and Welling (arXiv 1802.04712, equation 9): tile h has the score
w^T (tanh(V h) * sigmoid(U h)), a softmax over the bag's tiles makes weights of the scores, and the bag is the weighted
sum of its tiles.

Shape suffixes: N tiles of a bag, D width of an embedding, H hidden width, A width of the attention, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from histoscale.evaluate.splits import Labels, Rows
from histoscale.seeding import key

Bag = NDArray[np.floating]  # [N, D]


class GatedAttention(nn.Module):
    """From the tiles of a bag to the scores of its classes.

    Args:
        width: D.
        classes: C.
        hidden: H, what the tiles are projected to.
        attention: A.
        dropout: Share of the projected values that training drops.
    """

    def __init__(
        self, width: int, classes: int, hidden: int = 256, attention: int = 128, dropout: float = 0.25
    ) -> None:
        super().__init__()
        self.project = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.tanh_of = nn.Linear(hidden, attention)
        self.gate_of = nn.Linear(hidden, attention)
        self.score_of = nn.Linear(attention, 1)
        self.classify = nn.Linear(hidden, classes)

    def pool(self, tiles_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The bag [H], and the weights of its tiles [N], which sum to one."""
        hidden_NH = self.dropout(F.relu(self.project(tiles_ND)))
        gated_NA = torch.tanh(self.tanh_of(hidden_NH)) * torch.sigmoid(self.gate_of(hidden_NH))
        weights_N = torch.softmax(self.score_of(gated_NA)[:, 0], dim=0)
        return weights_N @ hidden_NH, weights_N

    def forward(self, tiles_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the classes [C], and the weights of the tiles [N]."""
        bag_H, weights_N = self.pool(tiles_ND)
        return self.classify(bag_H), weights_N


@dataclass(frozen=True)
class Abmil:
    """How the network is fitted: Adam, one bag a step, the epoch with the least validation loss.

    Attributes:
        learning_rate: Of Adam.
        weight_decay: Of Adam.
        epochs: At most so many passes over the bags.
        patience: Ends it after so many epochs without a lower loss.
        warm_epochs: Before which it never ends.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    epochs: int = 100
    patience: int = 15
    warm_epochs: int = 30

    @property
    def protocol(self) -> str:
        """In a sentence."""
        return (
            f"gated attention (arXiv 1802.04712) on z-scored embeddings; Adam at {self.learning_rate:g}, one bag a "
            f"step, classes weighted alike, at most {self.epochs} epochs, the one with the least validation loss"
        )

    def fit(
        self, bags: Sequence[Bag], labels: Labels, fit: Rows, val: Rows, seed: int, device: torch.device
    ) -> "FittedAbmil":
        """Fit the network.

        Args:
            bags: Of all slides.
            labels: int64, of all slides.
            fit: Slides that it learns from.
            val: Slides that choose the epoch.
            seed: Of weights, order and dropout.
            device: Where.
        """
        classes = int(labels.max()) + 1
        counts = np.bincount(labels[fit], minlength=classes)
        weights_C = torch.tensor(len(fit) / (classes * np.maximum(counts, 1)), dtype=torch.float32, device=device)
        mean_D, scale_D = _moments([bags[row] for row in fit], device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(key(seed, "abmil") & 0x7FFFFFFFFFFFFFFF)
            net = GatedAttention(len(mean_D), classes).to(device)
            fitted = FittedAbmil(net, mean_D, scale_D)
            optimiser = torch.optim.Adam(net.parameters(), self.learning_rate, weight_decay=self.weight_decay)
            self._run(fitted, optimiser, bags, torch.from_numpy(labels).to(device), fit, val, weights_C)
        return fitted

    def _run(
        self,
        fitted: "FittedAbmil",
        optimiser: torch.optim.Optimizer,
        bags: Sequence[Bag],
        labels: Tensor,
        fit: Rows,
        val: Rows,
        weights_C: Tensor,
    ) -> None:
        best, best_epoch, state = float("inf"), 0, _copied(fitted.net)
        for epoch in range(self.epochs):
            fitted.net.train()
            for row in fit[torch.randperm(len(fit)).numpy()]:
                scores_C, _ = fitted.net(fitted.normalised(bags[row]))
                loss = F.cross_entropy(scores_C, labels[row]) * weights_C[labels[row]]
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            now = _loss(fitted, bags, labels, val, weights_C)
            if now < best:
                best, best_epoch, state = now, epoch, _copied(fitted.net)
            elif epoch >= self.warm_epochs and epoch - best_epoch >= self.patience:
                break
        fitted.net.load_state_dict(state)
        fitted.net.eval()


class FittedAbmil:
    """A fitted network.

    Args:
        net: The network.
        mean_D: Mean of the embeddings that it was fitted on.
        scale_D: One over their standard deviation.
    """

    def __init__(self, net: GatedAttention, mean_D: Tensor, scale_D: Tensor) -> None:
        self.net = net
        self._mean_D, self._scale_D = mean_D, scale_D

    def normalised(self, bag: Bag) -> Tensor:
        """The tiles of a bag as the network takes them, [N, D]."""
        return (torch.from_numpy(bag).to(self._mean_D.device).float() - self._mean_D) * self._scale_D

    @torch.inference_mode()
    def tell(self, bag: Bag) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Probabilities of the classes [C], and the weights of the tiles [N], which sum to one."""
        self.net.eval()
        scores_C, weights_N = self.net(self.normalised(bag))
        return torch.softmax(scores_C.double(), dim=0).cpu().numpy(), weights_N.cpu().numpy()


def _moments(bags: Sequence[Bag], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean, and one over the standard deviation, of all tiles: [D] each."""
    count = sum(len(bag) for bag in bags)
    mean_D = np.asarray(sum(bag.sum(axis=0, dtype=np.float64) for bag in bags) / count)
    squares_D = np.asarray(sum(((bag - mean_D) ** 2).sum(axis=0) for bag in bags) / count)
    scale_D = 1.0 / np.sqrt(np.maximum(squares_D, 1e-12))
    return (
        torch.tensor(mean_D, dtype=torch.float32, device=device),
        torch.tensor(scale_D, dtype=torch.float32, device=device),
    )


@torch.no_grad()
def _loss(fitted: FittedAbmil, bags: Sequence[Bag], labels: Tensor, rows: Rows, weights_C: Tensor) -> float:
    fitted.net.eval()
    losses = []
    for row in rows:
        scores_C, _ = fitted.net(fitted.normalised(bags[row]))
        losses.append(float(F.cross_entropy(scores_C, labels[row]) * weights_C[labels[row]]))
    return float(np.mean(losses))


def _copied(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}
