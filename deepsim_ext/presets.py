"""Style transfer as papers and libraries have it: layers, Gram matrix, loss, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import _checks


@dataclass(frozen=True)
class StylePreset:
    """One way to transfer style; `style_preset` has them by name.

        grams = [gram_matrix(f, normalize=preset.normalize) for f in features_of_the_style_image]
        loss = preset.style_weight * style_loss(features, grams, **preset.style_options)
        loss += preset.content_weight * content_loss(features, target, **preset.content_options)
        loss += preset.tv_weight * total_variation_loss(image, **preset.tv_options)

    `nn.StyleTransferLoss.from_preset` has all of it in one module.

    Layers are named as in the paper of VGG: conv4_2 is the second convolution of the fourth block, relu4_2
    what follows it. Weights suit the images of the source, which `scale` names: BGR of 0-255 with the mean
    subtracted ("caffe": gatys_paper, ng_course, jcjohnson, neural_style_pt and film), or what torchvision's
    normalisation gives. (Caffe's ReLU works in place: its conv4_2, after the fact, is relu4_2.)
    """

    network: str  # "vgg16" or "vgg19"
    scale: str  # "caffe" or "torchvision", as in `vgg.VGG19Features`
    style_layers: tuple[str, ...]
    style_weight: float
    layer_weight: float  # of each style layer in the style loss
    normalize: str  # of gram_matrix and style_loss
    reduction: str  # of style_loss
    distance: str  # of style_loss
    content_layers: tuple[str, ...]  # empty where the source has no such content loss
    content_weight: float
    content_reduction: str  # of content_loss
    tv_weight: float = 0.0  # of the total variation of the image
    tv_distance: str = "l2"  # of total_variation_loss
    tv_reduction: str = "mean"  # of total_variation_loss

    @property
    def style_options(self) -> dict[str, Any]:
        """Arguments of `style_loss`."""
        return {
            "weights": [self.layer_weight] * len(self.style_layers),
            "normalize": self.normalize,
            "reduction": self.reduction,
            "distance": self.distance,
        }

    @property
    def content_options(self) -> dict[str, Any]:
        """Arguments of `content_loss`."""
        return {"reduction": self.content_reduction}

    @property
    def tv_options(self) -> dict[str, Any]:
        """Arguments of `total_variation_loss`."""
        return {"distance": self.tv_distance, "reduction": self.tv_reduction}


def style_preset(name: str) -> StylePreset:
    """The layers, formulas and weights of a paper or library.

    ================== ======================================== ========= =====================
    name               source                                   Gram over loss of a layer
    ================== ======================================== ========= =====================
    gatys_paper        Gatys, Ecker, Bethge (2016), eq. 1-7     1         sum d^2 / (4 C^2 N^2)
    ng_course          Ng, Deep Learning Specialization         1         sum d^2 / (2 N C)^2
    sum                the bare sums, without a factor          1         sum d^2
    pytorch_tutorial   Neural Transfer Using PyTorch            B C N     mean d^2
    jcjohnson          jcjohnson/neural-style                   C N       mean d^2
    neural_style_pt    ProGamerGov/neural-style-pt              C N       mean d^2
    pytorch_examples   pytorch/examples, fast_neural_style      C N       mean d^2
    pystiche           pystiche.loss.GramLoss                   N         mean d^2
    piq                piq.StyleLoss                            1         mean d^2
    basicsr_l1         basicsr PerceptualLoss, criterion "l1"   C N       mean |d|
    basicsr_l2         the same, "l2"                           C N       mean d^2
    basicsr_frobenius  the same, "fro"                          C N       sqrt(sum d^2)
    edgeconnect        Nazeri et al., EdgeConnect (2019)        C N       mean |d|
    film               (F / 255) (F / 255)^T / N                255^2 N   mean d^2
    ================== ======================================== ========= =====================

    Layers are summed, times `layer_weight`. (film's 255 is in it: the Gram matrix itself is over N.)
    jcjohnson has total variation too, 1e-3 times half the squares, and neural_style_pt 1e-3 times absolute
    differences. (jcjohnson's leaves out those along the last row and column.)

    Raises:
        TypeError: `name` is not a string.
        ValueError: no preset has that name.
    """
    _checks.choice("style_preset", "name", name, tuple(_PRESETS))
    return _PRESETS[name]


def _layers(kind: str, *numbers: str) -> tuple[str, ...]:
    return tuple(f"{kind}{number}" for number in numbers)


_FIRST = ("1_1", "2_1", "3_1", "4_1", "5_1")
_GATYS = {
    "network": "vgg19",
    "style_layers": _layers("conv", *_FIRST),
    "normalize": "none",
    "distance": "l2",
    "content_layers": ("conv4_2",),
}
_MEAN = {"reduction": "mean", "distance": "l2", "content_reduction": "mean"}
_NEURAL_STYLE = {
    "network": "vgg19",
    "scale": "caffe",
    "style_layers": _layers("relu", *_FIRST),
    "style_weight": 100.0,
    "layer_weight": 1.0,
    "normalize": "chw",
    "content_layers": ("relu4_2",),
    "content_weight": 5.0,
    "tv_reduction": "sum",
    **_MEAN,
}


def _basicsr(reduction: str, distance: str) -> StylePreset:
    # Which layers and weights is left to its users; these are a choice made here.
    return StylePreset(
        network="vgg19",
        scale="torchvision",
        style_layers=_layers("conv", "1_2", "2_2", "3_4", "4_4", "5_4"),
        style_weight=1.0,
        layer_weight=1.0,
        normalize="chw",
        reduction=reduction,
        distance=distance,
        content_layers=(),
        content_weight=0.0,
        content_reduction="mean",
    )


_PRESETS = {
    "gatys_paper": StylePreset(
        scale="caffe",
        style_weight=1e3,
        layer_weight=1 / 5,
        reduction="gatys",
        content_weight=1.0,
        content_reduction="gatys",
        **_GATYS,
    ),
    "ng_course": StylePreset(
        scale="caffe",
        style_weight=40.0,
        layer_weight=1 / 5,
        reduction="gatys",
        content_weight=10.0,
        content_reduction="gatys",
        **_GATYS,
    ),
    "sum": StylePreset(
        scale="torchvision",
        style_weight=1.0,
        layer_weight=1.0,
        reduction="sum",
        content_weight=1.0,
        content_reduction="sum",
        **_GATYS,
    ),
    "pytorch_tutorial": StylePreset(
        network="vgg19",
        scale="torchvision",
        style_layers=_layers("conv", "1_1", "1_2", "2_1", "2_2", "3_1"),  # its conv_1 to conv_5
        style_weight=1e6,
        layer_weight=1.0,
        normalize="bchw",
        content_layers=("conv2_2",),
        content_weight=1.0,
        **_MEAN,
    ),
    "jcjohnson": StylePreset(tv_weight=1e-3 / 2, tv_distance="l2", **_NEURAL_STYLE),
    "neural_style_pt": StylePreset(tv_weight=1e-3, tv_distance="l1", **_NEURAL_STYLE),
    "pytorch_examples": StylePreset(
        network="vgg16",
        scale="torchvision",
        style_layers=_layers("relu", "1_2", "2_2", "3_3", "4_3"),
        style_weight=1e10,
        layer_weight=1.0,
        normalize="chw",
        content_layers=("relu2_2",),
        content_weight=1e5,
        **_MEAN,
    ),
    "pystiche": StylePreset(
        network="vgg19",
        scale="torchvision",
        style_layers=_layers("relu", *_FIRST),
        style_weight=1e3,
        layer_weight=1 / 5,  # it takes the mean over layers
        normalize="hw",
        content_layers=("relu4_2",),
        content_weight=1.0,
        **_MEAN,
    ),
    "piq": StylePreset(
        network="vgg16",
        scale="torchvision",
        style_layers=("relu3_3",),
        style_weight=1.0,
        layer_weight=1.0,
        normalize="none",
        content_layers=("relu3_3",),
        content_weight=256.0,  # its content loss is summed over channels
        **_MEAN,
    ),
    "basicsr_l1": _basicsr("mean", "l1"),
    "basicsr_l2": _basicsr("mean", "l2"),
    "basicsr_frobenius": _basicsr("sum", "frobenius"),
    "edgeconnect": StylePreset(
        network="vgg19",
        scale="torchvision",
        style_layers=_layers("relu", "2_2", "3_4", "4_4", "5_2"),
        style_weight=250.0,
        layer_weight=1.0,
        normalize="chw",
        reduction="mean",
        distance="l1",
        content_layers=(),
        content_weight=0.0,
        content_reduction="mean",
    ),
    "film": StylePreset(
        network="vgg19",
        scale="caffe",
        style_layers=_layers("conv", *_FIRST),
        style_weight=1.0,
        layer_weight=255.0**-4,
        normalize="hw",
        content_layers=(),
        content_weight=0.0,
        **_MEAN,
    ),
}
