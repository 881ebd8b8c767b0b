"""Sizes and switches of the model, and the weights of its loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.errors import Rule, at_least, check_fields, in_range, one_of, require
from pipeline.names import NUM_VIEWS

HEADS = ("roadwork", "single_view", "mean_pool", "attention_mil", "cell_mil")
PRUNING = ("scored", "dynamic", "off", "random", "fixed", "oracle")
FUSIONS = ("gated", "mean")
METADATA_FIELDS = ("gps", "weather", "daytime", "scene", "text")
MOST_SIDE = 4096
MAX_VIEWS_PER_PASS = 192  # bounds the activations of one forward pass of the backbone
DECODE_SCALES = ("full", "half")
TERMS = (
    "roadwork", "consistency", "weather", "segmentation", "balance", "router_z", "distillation", "evidence",
    "evidence_masks",
)  # fmt: skip


@dataclass
class ModelConfig:
    """The frozen backbone, the trained head and the head's inputs."""

    backbone: str = "facebook/dinov3-vith16plus-pretrain-lvd1689m"
    """A DINOv3 hub id, a local folder, or `scenes-tiny`, the small backbone that comes with the project."""
    view_side: int = 512
    """Side of a view in pixels, a multiple of 16."""
    head: str = "roadwork"
    """`roadwork`, or a baseline: `single_view`, `mean_pool`, `attention_mil`, `cell_mil`."""
    pruning: str = "scored"
    """How views are chosen before the backbone sees them: `scored` keeps the best; `dynamic` takes them in the order of
    their scores until the answer is certain enough; `off` keeps all. Controls: `random`; `fixed`, the same ones for
    every photo; `oracle`, by their importance among all twelve, which saves nothing and is for study only."""
    keep_views: int = 8
    """Views kept of the twelve, the global one included; in `dynamic`, the maximum."""
    fixed_views: list[int] = field(default_factory=list)
    """Order of the mode `fixed`, as numbers of views from 1 to 11, the best first; the global one, 0, is always kept.
    `early-exit` finds it on the validation split."""
    pool_grid: int = 4
    """Cells per side that a view's patch tokens are pooled to."""
    width: int = 512
    """Width H of the head's tokens, a multiple of 4."""
    pyramid: bool = True
    """Fuse each cell with coarser levels of its view; false uses the projected cells as they are."""
    layers: int = 4
    """Gated attention layers."""
    attention_gate: bool = True
    """Pass attention's output through its sigmoid gate; false is plain attention."""
    heads: int = 8
    """Attention heads per layer."""
    experts: int = 4
    """Experts per layer; 1 is a dense SwiGLU without a router."""
    experts_per_token: int = 2
    """Experts that each token is sent to."""
    expert_width: int = 2048
    """Hidden width of one SwiGLU expert."""
    fusion: str = "gated"
    """`gated` fuses the kept views under learned gates, which are the views' importance; `mean` takes the mean of the
    views, which has no importance to teach the pruner with."""
    fusion_heads: int = 8
    """Attention heads of the gated fusion."""
    evidence: bool = True
    """Judge single cells beside the trunk, and let their log-odds join the answer; see `pipeline.model.evidence`."""
    evidence_share: float = 0.5
    """Weight of the cells' log-odds in the answer, beside the trunk's."""
    dropout: float = 0.1
    """Dropout before the classifiers."""
    metadata: tuple[str, ...] = ("gps", "weather", "daytime", "scene")
    """Metadata fields that the head reads; `text` is off because it leaks the label in the real data set."""
    text_dim: int = 384
    """Length of a text description's embedding."""
    metadata_field_dropout: float = 0.1
    """Probability in training that one field is NULL."""
    metadata_all_dropout: float = 0.5
    """Probability in training that all of a sample's metadata is NULL."""
    mask_side: int = 64
    """Side of the segmentation output in cells."""

    def __post_init__(self) -> None:
        self.metadata, self.fixed_views = tuple(self.metadata), list(self.fixed_views)
        patches = self.view_side // 16
        sides = f"a multiple of the patch side 16, like {max(16, round(self.view_side / 16) * 16)}"
        fits = 16 <= self.view_side <= MOST_SIDE and self.view_side % 16 == 0
        require(fits, "model.view_side", self.view_side, f"{sides}, and at most {MOST_SIDE}")
        share, positive, size = in_range("[0, 1)"), at_least(1, 1024), at_least(1, 65_536)
        check_fields(
            "model", self, head=one_of(HEADS), pruning=one_of(PRUNING), keep_views=in_range(f"[2, {NUM_VIEWS}]"),
            pool_grid=(lambda grid: grid % 2 == 0 and 2 <= grid <= patches,
                       f"even and at most the {patches} patches of a view's side"),
            layers=positive, width=size, heads=self._attention_heads(), fusion_heads=self._attention_heads(),
            experts=positive, experts_per_token=in_range(f"[1, {self.experts}]"), expert_width=size,
            fusion=one_of(FUSIONS), evidence_share=in_range("[0, 1]"), dropout=share, metadata_field_dropout=share,
            metadata_all_dropout=share, text_dim=size, mask_side=positive,
        )  # fmt: skip
        numbers, fixed = set(range(1, NUM_VIEWS)), self.fixed_views
        different = len(set(fixed)) == len(fixed) and numbers.issuperset(fixed)
        require(different, "model.fixed_views", fixed, "different numbers of views from 1 to 11")
        enough = self.pruning != "fixed" or len(fixed) >= self.keep_views - 1
        require(enough, "model.fixed_views", fixed, "at least keep_views - 1 of them; `early-exit` finds the best")
        important = self.fusion == "gated" or self.pruning != "oracle"
        goes_by = "gated with the pruning mode oracle, which goes by its importance"
        require(important, "model.fusion", self.fusion, goes_by)
        unknown = [field for field in self.metadata if field not in METADATA_FIELDS]
        different = len(set(self.metadata)) == len(self.metadata)
        require(different, "model.metadata", list(self.metadata), "different fields")
        require(not unknown, "model.metadata", unknown, f"among {', '.join(METADATA_FIELDS)}")

    def _attention_heads(self) -> Rule:
        return lambda heads: heads >= 1 and self.width % (4 * heads) == 0, "a divisor of width / 4"

    @property
    def num_views(self) -> int:
        """Number of views to cut from a photo: the single-view baseline needs the global one only."""
        return 1 if self.head == "single_view" else NUM_VIEWS

    def input_spec(self, decode_scale: str) -> InputSpec:
        """How photos become this model's input; `decode_scale` is `data.decode_scale`."""
        return InputSpec(self.view_side, self.num_views, self.mask_side, decode_scale)


@dataclass(frozen=True)
class InputSpec:
    """How a photo becomes a model's input: one value for training, evaluation and prediction, saved with the model."""

    view_side: int
    """Side S of a view in pixels."""
    num_views: int = NUM_VIEWS
    """Number of views V, from the first."""
    mask_side: int = 64
    """Cells per side of the mask targets."""
    decode_scale: str = "full"
    """`full`, or `half`: a JPEG is decoded at half its size where that is still as large as the views' canvas."""

    def __post_init__(self) -> None:
        check_fields("data", self, decode_scale=one_of(DECODE_SCALES))


@dataclass
class LossConfig:
    """Weight of each loss term, and the shape of the focal loss."""

    roadwork: float = 0.40
    """Weight of the focal loss between roadwork and none."""
    consistency: float = 0.25
    """Weight of the disagreement among the kept views' own predictions."""
    weather: float = 0.15
    """Weight of the cross entropy on the weather."""
    segmentation: float = 0.20
    """Weight of Dice + binary cross entropy on the six object classes."""
    balance: float = 0.01
    """Weight of the experts' load balancing."""
    router_z: float = 0.001
    """Weight of the z-loss, which keeps the router's logits small."""
    distillation: float = 0.05
    """Weight of the pruner's divergence from the importance that fusion gives the views."""
    evidence: float = 1.0
    """Weight of the cell evidence's own focal loss between roadwork and none."""
    evidence_masks: float = 1.0
    """Weight of the cell evidence's binary cross entropy with the masks, where there are any."""
    focal_alpha: float = 0.25
    """Focal weight of the class roadwork; the class none has 1 - focal_alpha."""
    focal_gamma: float = 2.0
    """Focal exponent: the larger, the less those samples count that the model is sure of; 0 turns it off."""
    label_smoothing: float = 0.1
    """Share of a label that is spread evenly over both classes."""
    mixup_alpha: float = 0.0
    """Mix training photos in pairs, with a share from Beta(alpha, alpha); 0 mixes none, 0.2 is usual."""

    def __post_init__(self) -> None:
        weights = {term: at_least(0) for term in TERMS}
        check_fields(
            "loss", self, **weights, focal_alpha=in_range("(0, 1)"), focal_gamma=at_least(0),
            label_smoothing=in_range("[0, 1)"), mixup_alpha=at_least(0),
        )  # fmt: skip
