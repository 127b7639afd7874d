# SPDX-License-Identifier: Apache-2.0
"""A vision transformer of your own with MoE layers, trained under a fold.

    python examples/vision.py --fold "tp2 | ep4" --devices 4

    python examples/vision.py --fold "pp2 | ep2" --devices 4 --microbatches 4

Nothing in the network knows of ranks: attention, MoE layers and whatever else you write are ordinary modules. The
strategy finds the blocks of `lightning_moefold.modules` and parallelises them; the rest is replicated, as under DDP. The
network names its layers and its ends, so that pipelines can cut it.
The pictures are drawn here: noisy discs, squares, crosses and rings that the network learns to tell apart.
"""

from __future__ import annotations

import argparse
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_moefold import MoEFoldStrategy
from lightning_moefold.callbacks import FoldSummary, LoadBalanceMonitor
from lightning_moefold.modules import Attention, MoELayer, load_balancing_loss

SHAPES = ("disc", "square", "cross", "ring")
PIXELS, PATCH = 16, 4


class Block(nn.Module):
    """Attention that sees all patches, then an MoE layer, each behind a norm and a residual."""

    def __init__(self, width: int, heads: int, experts: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal=False, rope_theta=None, qkv_bias=True, output_bias=True)
        self.moe = MoELayer(width, experts, 2, 2 * width, keep_routing=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.moe(self.norm2(x))


class VisionTransformer(nn.Module):
    pipeline_layers = "blocks"

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4, experts: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, (PIXELS // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, experts) for _ in range(depth)))
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(SHAPES)))

    def embed(self, batch: list[Tensor]) -> Tensor:
        """Images ``[rows, 1, pixels, pixels]`` to ``[rows, patches, width]``."""
        return self.patches(batch[0]).flatten(2).transpose(1, 2) + self.position

    def head(self, hidden: Tensor, batch: list[Tensor]) -> Tensor:
        """The loss in training, logits ``[rows, classes]`` otherwise."""
        logits = self.classify(hidden.mean(1))
        return F.cross_entropy(logits, batch[1]) if self.training else logits

    def forward(self, batch: list[Tensor]) -> Tensor:
        """These three steps; under the strategy, whatever the fold makes of them."""
        return self.head(self.blocks(self.embed(batch)), batch)


class Classifier(L.LightningModule):
    def __init__(self, balance: float = 0.01) -> None:
        super().__init__()
        self.balance = balance
        self.network: VisionTransformer | None = None

    def configure_model(self) -> None:
        if self.network is None:
            self.network = VisionTransformer()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        assert self.network is not None
        loss = self.network(batch)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        # Both are averages over all data ranks: this one by Lightning's convention, the other as it is.
        return loss + self.balance * load_balancing_loss(self.network)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        assert self.network is not None
        right = (self.network(batch).argmax(1) == batch[1]).float().mean()
        self.log("val/accuracy", right, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def draw(count: int, seed: int) -> TensorDataset:
    """Pictures and their classes."""
    chance = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(SHAPES), (count,), generator=chance)
    centre = torch.randint(5, PIXELS - 5, (count, 2, 1, 1), generator=chance)
    size = torch.randint(3, 5, (count, 1, 1), generator=chance)
    y, x = torch.meshgrid(torch.arange(PIXELS), torch.arange(PIXELS), indexing="ij")
    dy, dx = (y - centre[:, 0]).abs(), (x - centre[:, 1]).abs()
    distance = (dy.square() + dx.square()).float().sqrt()
    disc, ring = distance <= size, (distance <= size) & (distance > size - 1.5)
    square, cross = torch.maximum(dy, dx) <= size, (torch.minimum(dy, dx) < 1) & (torch.maximum(dy, dx) <= size)
    images = torch.stack([disc, square, cross, ring], 1)[torch.arange(count), kind].float()
    return TensorDataset((images + 0.25 * torch.randn(images.shape, generator=chance)).unsqueeze(1), kind)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--fold", default="tp2 | ep4", help="parallel sizes; the rest is data parallel")
    parser.add_argument("--devices", type=int, default=4, help="ranks")
    parser.add_argument("--microbatches", type=int, help="of a batch; needed by pp")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the data")
    parser.add_argument("--images", type=int, default=1024, help="pictures to train on")
    args = parser.parse_args()
    for pattern in (".*does not have many workers", ".*isinstance.treespec, LeafSpec"):
        warnings.filterwarnings("ignore", pattern)
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        strategy=MoEFoldStrategy(fold=args.fold, num_microbatches=args.microbatches),
        accelerator="auto", devices=args.devices, max_epochs=args.epochs,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[FoldSummary(), LoadBalanceMonitor(log_every_n_steps=8)], log_every_n_steps=8,
    )  # fmt: skip
    module = Classifier()
    trainer.fit(module, DataLoader(draw(args.images, 0), 32, shuffle=True), DataLoader(draw(256, 1), 32))
    if trainer.is_global_zero:
        metrics = trainer.callback_metrics
        print(f"val/accuracy {metrics['val/accuracy']:.3f} over {', '.join(SHAPES)}; loss {metrics['train/loss']:.3f}")


if __name__ == "__main__":
    main()
