"""Two-stage encoding: the global view first, then only the views that the pruner keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from pipeline.devices import upload
from pipeline.model.backbone import FrozenBackbone, pool_cells, pool_regions
from pipeline.model.mixup import Mix
from pipeline.model.pruning import MeanPruner, ViewPruner, choose_views, draw_keep, rank_views, rounds_up_to


@dataclass
class Encoded:
    """The kept views of B photos."""

    cls: torch.Tensor
    """CLS tokens, [B, K, D]."""
    cells: torch.Tensor
    """Mean and max of the patch tokens of each cell, [B, K, g*g, 2D]."""
    boxes: torch.Tensor
    """Boxes as x0, y0, x1, y1 in [0, 1], [B, K, 4]."""
    mask: torch.Tensor
    """Which views exist and were kept, bool [B, K]."""
    indices: torch.Tensor
    """Numbers of the kept views, int64 [B, K]; the global view comes first."""
    scores: torch.Tensor | None
    """The pruner's scores, [B, V]; None where nothing is ever pruned."""
    gates: torch.Tensor
    """How much of each view counts, [B, K]: sigmoid(score), and 1 for the global view. The logarithm is added to the
    attention logits of the view's tokens, and the fusion's sum is weighted by it, so to the
    trunk 0 is the same as no view; the cell evidence has no gates."""
    mix: Mix | None = None
    """How the photos' tokens are mixed, None if they are not; the head mixes their metadata."""


class Tokens(NamedTuple):
    """All that the head needs of the backbone, for B photos."""

    cls: torch.Tensor
    """CLS tokens, [B, V, D]; zeros for views that do not exist."""
    cells: torch.Tensor
    """Mean and max of the patch tokens of each cell, [B, V, g*g, 2D]; zeros for views that do not exist."""
    regions: torch.Tensor
    """Means of the global view's patch tokens under each view's box, [B, V, D]."""


def all_tokens(
    backbone: FrozenBackbone, views: torch.Tensor, boxes: torch.Tensor, view_mask: torch.Tensor, pool_grid: int
) -> Tokens:
    """Tokens of every view that exists, in one pass of the backbone over the views of all photos.

    Args:
        backbone: The frozen backbone.
        views: uint8 [B, V, 3, S, S]; the global view, which is the first, always exists.
        boxes: [B, V, 4] as x0, y0, x1, y1 in [0, 1].
        view_mask: bool [B, V], best on the CPU; masked views do not reach the backbone.
        pool_grid: Cells per side g.

    Returns:
        The tokens, in the backbone's precision.
    """
    photo, view = (upload(place, backbone.device) for place in view_mask.nonzero(as_tuple=True))
    present = upload(views, backbone.device)[photo, view]
    cls, cells, regions = view_tokens(backbone, present, boxes, view_mask, pool_grid)
    return spread(view_mask.shape, (photo, view), cls, cells, regions)


def spread(
    shape: Sequence[int], where: tuple[Any, Any], cls: torch.Tensor, cells: torch.Tensor, regions: torch.Tensor
) -> Tokens:
    """Tokens of all views: the given ones at their positions, zeros elsewhere.

    Args:
        shape: Photos B and views V.
        where: Photos and views that `cls` and `cells` belong to, as an index of [B, V].
        cls: [M, D].
        cells: [M, g*g, 2D].
        regions: [B, V, D].
    """
    tokens = Tokens(cls.new_zeros((*shape, *cls.shape[1:])), cells.new_zeros((*shape, *cells.shape[1:])), regions)
    tokens.cls[where], tokens.cells[where] = cls, cells
    return tokens


def view_tokens(
    backbone: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    views: torch.Tensor,
    boxes: torch.Tensor,
    view_mask: torch.Tensor,
    pool_grid: int,
) -> Tokens:
    """`all_tokens` without space for views that do not exist: what the feature cache stores.

    Args:
        backbone: The frozen backbone.
        views: uint8 [M, 3, S, S], the views that exist, photo after photo.
        boxes: [B, V, 4].
        view_mask: bool [B, V], with M of them true, the first of each photo among them. On the CPU, so that nothing
            here makes a host wait for a GPU.
        pool_grid: Cells per side g.

    Returns:
        cls [M, D], cells [M, g*g, 2D] and regions [B, V, D].
    """
    counts = view_mask.sum(dim=1)
    first = counts.cumsum(dim=0) - counts  # places of the global views; a mask as an index would make the host wait
    cls, patches = backbone(views)
    whole = patches.index_select(0, upload(first, patches.device))
    return Tokens(cls, pool_cells(patches, pool_grid), pool_regions(whole, boxes))


class TokenSource(Protocol):
    """The source of a batch's tokens: the backbone, which computes them on demand, or the feature cache."""

    tokens: Tokens
    """Tokens so far: the global view and the regions from the start, other views once they were taken."""
    global_cls: torch.Tensor
    """The global view's CLS token, [B, D], which does not change when other views are taken."""

    def take(self, wanted: torch.Tensor) -> None:
        """Make the tokens of the views in bool [B, V] available."""


class OnlineTokens:
    """A `TokenSource` that runs the backbone on a view when it is first taken.

    All views go to the backbone's device at once, as bytes: in one copy from pinned memory, while the device computes.
    Views that were picked on the host would be gathered there first, into memory that is not pinned.
    """

    def __init__(self, backbone: FrozenBackbone, views: torch.Tensor, boxes: torch.Tensor, pool_grid: int):
        """Encode the global view; see `all_tokens` for the shapes."""
        self.backbone, self.pool_grid = backbone, pool_grid
        self.views = upload(views, backbone.device)
        cls, patches = backbone(self.views[:, 0])
        cells, regions = pool_cells(patches, pool_grid), pool_regions(patches, boxes)
        self.tokens = spread(views.shape[:2], (slice(None), 0), cls, cells, regions)
        self.global_cls = cls
        self.taken = torch.zeros(views.shape[:2], dtype=torch.bool, device=cls.device)
        self.taken[:, 0] = True

    def take(self, wanted: torch.Tensor) -> None:
        """Encode the wanted views that are not encoded yet, in one pass of the backbone over all photos.

        A host waits for its GPU here, once: how many views there are depends on their scores.
        """
        photo, view = (wanted & ~self.taken).nonzero(as_tuple=True)
        if len(photo):
            cls, patches = self.backbone(self.views[photo, view])
            self.tokens.cls[photo, view] = cls
            self.tokens.cells[photo, view] = pool_cells(patches, self.pool_grid)
            self.taken[photo, view] = True


class CachedTokens:
    """A `TokenSource` of tokens that were computed before; taking costs nothing."""

    def __init__(self, tokens: Tokens):
        self.tokens, self.global_cls = tokens, tokens.cls[:, 0]

    def take(self, wanted: torch.Tensor) -> None:
        """Do nothing: all tokens are available."""


class MixedTokens:
    """A `TokenSource` of mixed photos.

    Taking a view of a mixed photo takes it of both its photos. The pruner scores the two of a pair by mixtures of the
    same tokens, so online this costs less than twice the views, and from the cache nothing.
    """

    def __init__(self, source: TokenSource, mix: Mix):
        """Mix the tokens of a source; the mix must be on its device."""
        self.source, self.mix = source, mix
        self.global_cls = mix.blend(source.global_cls)
        self.tokens = self._mixed()

    def take(self, wanted: torch.Tensor) -> None:
        """Make the tokens of the views in bool [B, V] available."""
        self.source.take(wanted | wanted[self.mix.partner])
        self.tokens = self._mixed()

    def _mixed(self) -> Tokens:
        return Tokens(*(self.mix.blend(part) for part in self.source.tokens))


class TwoStageEncoder(nn.Module):
    """Scores views from the global view's tokens, and runs the backbone on the best ones only.

    Baselines encode every view that they use; only the roadwork head prunes.
    """

    def __init__(self, config: PreTrainedConfig):
        """Take the model's own configuration, no copy of its sizes, since `early-exit` changes how views are pruned."""
        super().__init__()
        self.config: Any = config
        self.pruner = build_pruner(self.config) if self.config.head == "roadwork" else None
        # Not an nn.Module, so it is in no state_dict and no parameter list.
        self.backbone: FrozenBackbone | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pruner's weights and of the returned tokens; fp32 for baselines, whose heads cast."""
        return next((p.dtype for p in self.parameters()), torch.float32)

    def forward(
        self,
        source: TokenSource,
        boxes: torch.Tensor,
        view_mask: torch.Tensor,
        keep_all: bool,
        importance: torch.Tensor | None = None,
    ) -> Encoded:
        """Score the views, and take the chosen ones.

        Args:
            source: Source of the tokens.
            boxes: [B, V, 4] as x0, y0, x1, y1 in [0, 1].
            view_mask: bool [B, V].
            keep_all: Prune nothing.
            importance: [B, V], used instead of the scores to choose views.

        Returns:
            The kept views' tokens.
        """
        config, scores = self.config, self.score(source)
        if scores is None:
            indices = torch.arange(view_mask.shape[1], device=view_mask.device).expand(len(view_mask), -1)
        else:
            mode, keep = config.pruning, config.keep_views
            if mode == "dynamic" and self.training:
                keep = draw_keep(keep)
            indices = choose_views(
                scores if importance is None else importance,
                view_mask,
                keep=view_mask.shape[1] if keep_all else keep,
                mode=mode,
                explore=self.training and importance is None,
                fixed_views=config.fixed_views,
            )
        return self.gather(source, boxes, scores, indices, view_mask.gather(1, indices))

    def encode_in_rounds(
        self,
        source: TokenSource,
        boxes: torch.Tensor,
        view_mask: torch.Tensor,
        certain: Callable[[Encoded, int], torch.Tensor],
    ) -> Encoded:
        """Take the views in the order of their scores, a few in each round, until the answer is certain.

        A round encodes the next views of all undecided photos in one pass of the backbone.

        Args:
            source: Source of the tokens.
            boxes: [B, V, 4].
            view_mask: bool [B, V].
            certain: Whether to stop, bool [b], given the views kept so far of b photos and the number of the round,
                from 0. It is not called once all of a photo's views, or `keep_views` of them, were taken.

        Returns:
            The kept views' tokens; K is the largest number that a photo has kept.
        """
        scores = self.score(source)
        assert scores is not None
        order = rank_views(scores, view_mask, "scored", explore=False)
        kept = torch.zeros_like(view_mask)
        undecided = torch.arange(len(kept), device=kept.device)
        rounds = rounds_up_to(self.config.keep_views)
        for number, keep in enumerate(rounds):
            kept[undecided[:, None], order[undecided, :keep]] = True
            kept &= view_mask
            source.take(kept)
            undecided = undecided[view_mask[undecided].sum(dim=1) > keep]
            if keep == rounds[-1] or not len(undecided):
                break
            seen = self.gather(source, boxes, scores, *first_places(kept[undecided]), undecided)
            undecided = undecided[~certain(seen, number)]
        return self.gather(source, boxes, scores, *first_places(kept))

    def online(self, views: torch.Tensor, boxes: torch.Tensor) -> OnlineTokens:
        """The source that computes tokens from views, uint8 [B, V, 3, S, S]."""
        assert self.backbone is not None
        return OnlineTokens(self.backbone, views, boxes, self.config.pool_grid)

    def score(self, source: TokenSource) -> torch.Tensor | None:
        """The pruner's scores [B, V]; None for baselines."""
        if self.pruner is None:
            return None
        scores: torch.Tensor = self.pruner(source.tokens.regions.to(self.dtype), source.global_cls.to(self.dtype))
        return scores

    def gather(
        self,
        source: TokenSource,
        boxes: torch.Tensor,
        scores: torch.Tensor | None,
        indices: torch.Tensor,
        mask: torch.Tensor,
        photos: torch.Tensor | None = None,
    ) -> Encoded:
        """Take the chosen views and put their tokens side by side.

        Args:
            source: Source of the tokens of B photos.
            boxes: [B, V, 4].
            scores: [B, V], or None.
            indices: int64 [b, K], the chosen views.
            mask: bool [b, K], which of these are taken; the others are not attended to.
            photos: int64 [b], which photos of the batch these are; all of them if not given.
        """
        if photos is None:
            photos = torch.arange(len(boxes), device=boxes.device)
        chosen = photos[:, None], indices
        wanted = torch.zeros(boxes.shape[:2], dtype=torch.bool, device=boxes.device)
        wanted[chosen] = mask
        source.take(wanted)
        scores = None if scores is None else scores[photos]
        return Encoded(
            cls=source.tokens.cls[chosen].to(self.dtype),
            cells=source.tokens.cells[chosen].to(self.dtype),
            boxes=boxes[chosen],
            mask=mask,
            indices=indices,
            scores=scores,
            gates=self._gates(scores, indices),
        )

    @staticmethod
    def _gates(scores: torch.Tensor | None, indices: torch.Tensor) -> torch.Tensor:
        if scores is None:
            return torch.ones_like(indices, dtype=torch.float32)
        gates = scores.sigmoid().gather(1, indices)
        return torch.cat([torch.ones_like(gates[:, :1]), gates[:, 1:]], dim=1)


def build_pruner(config: Any) -> nn.Module:
    """The pruner that a model's configuration describes: one, or the mean of several."""
    pruners = [ViewPruner(config.backbone_dim, config.input_spec.num_views) for _ in range(config.pruners)]
    return MeanPruner(pruners) if len(pruners) > 1 else pruners[0]


def first_places(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions at which bool [B, V] is True, in the order of the views.

    Returns:
        int64 [B, K] with K the largest number of any row, and bool [B, K], False where a row has fewer.
    """
    most = int(kept.sum(dim=1).max())
    indices = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return indices, kept.gather(1, indices)
