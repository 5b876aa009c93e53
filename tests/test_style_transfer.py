"""nn.StyleTransferLoss: against its terms written out, its targets and state, bad input."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from deepsim_ext import StyleTransferResult, gram_matrix, reference
from deepsim_ext.nn import StyleTransferLoss

# A name with a dot, as of a submodule: buffers could not be called that.
STYLE, CONTENT = ("conv1", "block.2"), ("block.2", "conv3")
LAYERS = ("conv1", "block.2", "conv3")
SIZES = {1: (24,), 2: (12, 16), 3: (4, 6, 8)}


def features(
    dims: int = 2, b: int = 1, seed: int = 0, larger: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Features of `b` pictures, at half the size from layer to layer."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(
            b, 3 + i, *((n + larger) >> i for n in SIZES[dims]), generator=g, dtype=torch.float64
        ).to(dtype)
        for i, name in enumerate(LAYERS)
    }


def area_mean(mask: Tensor, size: torch.Size) -> Tensor:
    """Averages over blocks that are multiples of a position: [*spatial] to `size`."""
    for dim, n in enumerate(size):
        mask = mask.unflatten(dim, (n, -1)).mean(dim + 1)
    return mask


def ready(b: int = 1, **options) -> StyleTransferLoss:
    criterion = StyleTransferLoss(STYLE, CONTENT, **options)
    criterion.set_style(features(seed=1, b=b))
    criterion.set_content(features(seed=2, b=b))
    return criterion


def leaves(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: f.detach().clone().requires_grad_() for name, f in given.items()}


OPTIONS = {
    "defaults": {},
    "gatys": {"normalize": "none", "reduction": "gatys", "content_reduction": "gatys"},
    "weights": {
        "style_weight": 30.0,
        "content_weight": 0.3,
        "tv_weight": 2.0,
        "style_layer_weights": [0.2, 5],
        "content_layer_weights": (1, 0.5),
        "tv_distance": "l1",
    },
    "l1": {"normalize": "hw", "distance": "l1", "reduction": "sum", "content_reduction": "sum"},
    "frobenius": {"normalize": 50.0, "distance": "frobenius", "reduction": "sum"},
    "bchw": {"normalize": "bchw", "tv_weight": 0.5, "tv_reduction": "sum"},
}


def written_out(
    f: dict[str, Tensor],
    style: dict[str, Tensor],
    content: dict[str, Tensor],
    image: Tensor,
    *,
    style_weight: float = 1.0,
    content_weight: float = 1.0,
    tv_weight: float = 0.0,
    style_layer_weights: list[float] = (1.0, 1.0),
    content_layer_weights: list[float] = (1.0, 1.0),
    normalize: str | float = "chw",
    reduction: str = "mean",
    distance: str = "l2",
    content_reduction: str = "mean",
    tv_distance: str = "l2",
    tv_reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Content, style and total variation of pictures of one size and number."""
    content_term = content_weight * reference.content_loss(
        [f[n] for n in CONTENT],
        [content[n] for n in CONTENT],
        weights=list(content_layer_weights),
        reduction=content_reduction,
    )
    style_term = style_weight * reference.style_loss(
        [f[n] for n in STYLE],
        [reference.gram_matrix(style[n], normalize=normalize) for n in STYLE],
        weights=list(style_layer_weights),
        normalize=normalize,
        reduction=reduction,
        distance=distance,
    )
    variation = reference.total_variation_loss(image, distance=tv_distance, reduction=tv_reduction)
    return content_term, style_term, tv_weight * variation


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_sum_of_its_terms(name, b, dims):
    style, content, given = (features(dims, b, seed) for seed in (1, 2, 3))
    criterion = StyleTransferLoss(STYLE, CONTENT, **OPTIONS[name])
    criterion.set_style(style)
    criterion.set_content(content)
    f, image = leaves(given), torch.randn(b, 3, *SIZES[dims], dtype=torch.float64, requires_grad=True)
    got = criterion(f, image, return_terms=True)
    expected = written_out(f, style, content, image, **OPTIONS[name])
    assert isinstance(got, StyleTransferResult)
    torch.testing.assert_close(got[1:], expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.loss, sum(expected), rtol=1e-12, atol=0)
    assert torch.equal(criterion(f, image), got.loss)
    assert all(term.shape == () for term in got)
    inputs = [*f.values(), image]
    ours, theirs = (
        torch.autograd.grad(loss, inputs, materialize_grads=True) for loss in (got.loss, sum(expected))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", ["none", "hw", "chw", "bchw", 50.0])
def test_one_target_for_a_batch_is_that_target_for_each_image(normalize):
    options = {"normalize": normalize, "reduction": "sum", "content_reduction": "sum"}
    given, each = features(b=3, seed=3), ready(**options)
    separate = sum(each({n: f[i : i + 1] for n, f in given.items()}) for i in range(3))
    if normalize == "bchw":  # by whose B both Gram matrices are divided
        content = sum(
            each({n: f[i : i + 1] for n, f in given.items()}, return_terms=True).content for i in range(3)
        )
        separate = content + (separate - content) / 3**2
    torch.testing.assert_close(each(given), separate)


def test_styles_blend_by_the_weighted_mean_of_their_gram_matrices():
    pictures = [features(seed=1), features(seed=2, larger=8), features(seed=3, b=2)]
    criterion, f = StyleTransferLoss(STYLE), features(b=2, seed=4)
    for weights, expected in (
        (None, [1 / 3] * 3),
        ((1, 0.5, 2.5), (0.25, 0.125, 0.625)),
        ([0, 0, 7], [0, 0, 1]),
    ):
        criterion.set_style(pictures, blend_weights=weights)
        targets = [
            sum(w * reference.gram_matrix(p[n]) for w, p in zip(expected, pictures, strict=True))
            for n in STYLE
        ]
        torch.testing.assert_close(
            criterion(f), reference.style_loss([f[n] for n in STYLE], targets), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("normalize", ["none", 37.0])
def test_a_style_is_as_if_it_were_as_large_as_the_image(normalize):
    """Twice the same picture side by side is the same style, by sums too."""
    picture, f = features(seed=1), features(seed=2)
    twice = {n: torch.cat([x, x], dim=3) for n, x in picture.items()}
    losses = []
    for style in (picture, twice, [picture, twice]):
        criterion = StyleTransferLoss(STYLE, normalize=normalize)
        criterion.set_style(style)
        losses.append(criterion(f))
    torch.testing.assert_close(losses[1:], [losses[0]] * 2, rtol=1e-12, atol=0)
    exact = [reference.gram_matrix(picture[n], normalize=normalize) for n in STYLE]
    expected = reference.style_loss([f[n] for n in STYLE], exact, normalize=normalize)
    torch.testing.assert_close(losses[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_regions_have_styles_of_their_own(dims):
    """Masks of the picture's size become averages over areas at every layer's."""
    g = torch.Generator().manual_seed(7)
    sky, ground = torch.rand(2, *SIZES[dims], generator=g, dtype=torch.float64)
    part = torch.rand(SIZES[dims], generator=g) < 0.5
    night, storm, fields, f = (features(dims, seed=seed) for seed in range(4))
    options = {"normalize": "none", "reduction": "gatys", "style_layer_weights": [0.3, 2.0]}
    criterion = StyleTransferLoss(STYLE, **options)
    criterion.add_region(sky, [night, storm], blend_weights=[3, 1], style_masks=[part, None])
    criterion.add_region(ground[None], fields, weight=0.4)
    f = leaves(f)
    expected = 0.0
    for name, layer_weight in zip(STYLE, (0.3, 2.0), strict=True):
        size = f[name].shape[2:]

        def gram(x: Tensor, mask: Tensor | None = None, size: torch.Size = size) -> Tensor:
            mask = None if mask is None else area_mean(mask.double(), size)
            return reference.gram_matrix(x, normalize="none", mask=mask)

        for region, target, weight in (
            (sky, 0.75 * gram(night[name], part) + 0.25 * gram(storm[name]), 1.0),
            (ground, gram(fields[name]), 0.4),
        ):
            expected = expected + layer_weight * weight * reference.style_loss(
                f[name], target, normalize="none", reduction="gatys", mask=area_mean(region, size)
            )
    got = criterion(f)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    inputs = [f[n] for n in STYLE]
    ours, theirs = (torch.autograd.grad(loss, inputs) for loss in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_regions_add_to_what_is_set_and_set_style_replaces_all():
    f, whole, other = (features(seed=seed) for seed in (0, 1, 2))
    mask = torch.zeros(12, 16)
    mask[:6] = 1
    criterion = StyleTransferLoss(STYLE)
    criterion.set_style(whole)
    alone = criterion(f)
    criterion.add_region(mask, other)
    both = criterion(f)
    criterion.reset()
    criterion.add_region(mask.bool(), other)
    torch.testing.assert_close(both, alone + criterion(f))
    criterion.set_style(whole)
    assert torch.equal(criterion(f), alone)
    assert sorted(criterion.state_dict()) == ["_extra_state", "gram_0_0", "gram_0_1"]


def test_a_region_of_each_image():
    style, f = features(seed=1), features(b=2, seed=2)
    masks = torch.rand(2, 12, 16, dtype=torch.float64)
    together, apart = StyleTransferLoss(STYLE, reduction="sum"), []
    together.add_region(masks, style)
    for i in range(2):
        one = StyleTransferLoss(STYLE, reduction="sum")
        one.add_region(masks[i], style)
        apart.append(one({n: x[i : i + 1] for n, x in f.items()}))
    torch.testing.assert_close(together(f), sum(apart))


def test_a_region_without_area_has_no_loss_against_nothing():
    criterion = StyleTransferLoss(STYLE)
    criterion.add_region(torch.zeros(12, 16), features(), style_masks=torch.zeros(5, 7))
    f = leaves(features(seed=1))
    loss = criterion(f)
    loss.backward()
    assert loss.item() == 0 and all(not f[n].grad.any() for n in STYLE)


def test_a_mask_smaller_than_a_layer_is_spread_over_it():
    f, style = features(), features(seed=1)
    losses = []
    for mask in (torch.tensor([[1.0], [0.0]]), torch.tensor([1.0] * 6 + [0.0] * 6)[:, None].expand(12, 16)):
        criterion = StyleTransferLoss(STYLE)
        criterion.add_region(mask, style)
        losses.append(criterion(f))
    torch.testing.assert_close(*losses)


def test_terms_of_weight_zero_need_neither_target_nor_features():
    f = features()
    criterion = StyleTransferLoss(STYLE, CONTENT, content_weight=0)
    criterion.set_content({})
    criterion.set_style(f)
    without = {n: f[n] for n in STYLE}
    result = criterion(without, return_terms=True)
    assert result.content.item() == 0 and result.total_variation.item() == 0
    assert result.loss.dtype == torch.float64
    criterion = StyleTransferLoss(STYLE, CONTENT, style_weight=0)
    criterion.set_style({})
    criterion.add_region(torch.ones(2, 2), {})
    criterion.set_content(f)
    assert criterion({n: f[n] for n in CONTENT}, return_terms=True).style.item() == 0


def test_total_variation_alone():
    image = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    result = StyleTransferLoss((), tv_weight=2.0)({}, image, return_terms=True)
    torch.testing.assert_close(result.loss, 2 * reference.total_variation_loss(image))
    assert result.style.item() == result.content.item() == 0


def test_targets_are_copies_without_gradient():
    style, content = leaves(features(seed=1)), leaves(features(seed=2))
    criterion, f = StyleTransferLoss(STYLE, CONTENT), features()
    criterion.set_style(style)
    criterion.set_content(content)
    assert not any(t.requires_grad for t in criterion.buffers()) and not list(criterion.parameters())
    before = criterion(f)
    with torch.no_grad():
        for x in (*style.values(), *content.values()):
            x.zero_()
    assert torch.equal(criterion(f), before)


def test_targets_set_in_inference_mode_take_part_in_training():
    with torch.inference_mode():
        criterion = ready()
        criterion.add_region(torch.ones(12, 16), features(seed=1))
    assert not any(t.is_inference() for t in criterion.buffers())
    f = leaves(features())
    criterion(f).backward()
    assert f["conv1"].grad.any()


# ---- precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_and_single_features(dtype):
    """Activations as large as VGG's, whose Gram matrices leave the range of float16."""
    style, content, given = (
        {n: (400 * f.abs()).to(dtype) for n, f in features(seed=seed).items()} for seed in (1, 2, 3)
    )
    for name in ("gatys", "weights", "l1", "frobenius"):
        losses = []
        for exact in (False, True):
            criterion = StyleTransferLoss(STYLE, CONTENT, **OPTIONS[name])
            to = (lambda fs: {n: f.double() for n, f in fs.items()}) if exact else (lambda fs: fs)
            criterion.set_style(to(style))
            criterion.set_content(to(content))
            mask = torch.rand(12, 16, generator=torch.Generator().manual_seed(0))
            criterion.add_region(mask, to(style), weight=0.5)
            f, image = leaves(to(given)), torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0))
            loss = criterion(f, image.to(dtype).to(torch.float64 if exact else dtype))
            assert loss.dtype == (torch.float64 if exact else torch.float32)
            losses.append((loss, list(f.values())))
        (loss, ours), (expected, exact) = losses
        torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
        for x, e in zip(ours, torch.autograd.grad(expected, exact), strict=True):
            scale = 1 / e.abs().max().item()  # float16 gradients stay normal numbers
            (g,) = torch.autograd.grad(loss * scale, x, retain_graph=True)
            assert g.dtype == dtype
            assert (g.double() - e * scale).norm() <= tolerance * (e * scale).norm()


def test_targets_go_to_the_dtype_of_the_features():
    single = {n: f.float() for n, f in features().items()}
    criterion = ready()
    expected = criterion(features())
    assert criterion(single).dtype == torch.float32
    torch.testing.assert_close(criterion(single).double(), expected, rtol=1e-5, atol=0)
    # A target in float32 is not rounded to half where the features are.
    halves = {n: f.bfloat16() for n, f in features().items()}
    exact = ready()({n: f.double() for n, f in halves.items()})
    torch.testing.assert_close(criterion.float()(halves).double(), exact, rtol=1e-5, atol=0)
    assert {t.dtype for t in criterion.buffers()} == {torch.float32}
    assert criterion(features()).dtype == torch.float64


def test_half_leaves_targets_as_they_are():
    criterion = ready().float()
    before = criterion(features())
    for wish in (criterion.half, criterion.bfloat16, lambda: criterion.to(torch.float16)):
        wish()
        assert {t.dtype for t in criterion.buffers()} == {torch.float32}
        assert torch.equal(criterion(features()), before)
    assert {t.device.type for t in criterion.to("meta", torch.float16).buffers()} == {"meta"}


def test_under_autocast():
    conv = torch.nn.Conv2d(3, 4, 3)
    image = torch.rand(1, 3, 9, 10, requires_grad=True)
    criterion = StyleTransferLoss(["a"], ["a"], tv_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = conv(torch.rand(1, 3, 9, 10))
        assert target.dtype == torch.bfloat16
        criterion.set_style({"a": target})
        criterion.set_content({"a": target})
        loss = criterion({"a": conv(image)}, image)
    assert loss.dtype == torch.float32
    loss.backward()
    outside = criterion({"a": conv(image).bfloat16()}, image)
    torch.testing.assert_close(loss, outside, rtol=1e-2, atol=0)


# ---- state -------------------------------------------------------------------------------------------------


def with_regions() -> StyleTransferLoss:
    criterion = ready()
    criterion.add_region(torch.rand(12, 16), features(seed=5), weight=0.25)
    return criterion


def saved(module: torch.nn.Module) -> dict:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_fresh_module_loads_the_targets():
    criterion, f = with_regions(), features(seed=9)
    expected = criterion(f)
    fresh, nested = (
        StyleTransferLoss(STYLE, CONTENT),
        torch.nn.ModuleList([StyleTransferLoss(STYLE, CONTENT)]),
    )
    fresh.load_state_dict(saved(criterion))
    assert torch.equal(fresh(f), expected)
    nested.load_state_dict(saved(torch.nn.ModuleList([criterion])))
    assert torch.equal(nested[0](f), expected)
    assigned = StyleTransferLoss(STYLE, CONTENT)
    assigned.load_state_dict(saved(criterion), assign=True)
    assert torch.equal(assigned(f), expected)
    # In place of other targets, and of some where there are none.
    other = ready(b=2)
    other.load_state_dict(saved(criterion))
    assert torch.equal(other(f), expected)
    other.load_state_dict(saved(StyleTransferLoss(STYLE, CONTENT)))
    assert not list(other.buffers())
    with pytest.raises(ValueError, match="the style must be set"):
        other(f)


def test_targets_that_do_not_fit_are_not_loaded_and_change_nothing():
    criterion, f = ready(), features(seed=9)
    expected = criterion(f)
    others = StyleTransferLoss(("conv1", "conv2"), CONTENT).state_dict()
    with pytest.raises(
        RuntimeError, match=r"style_layers must be \['conv1', 'block.2'\], got \['conv1', 'conv2'\]"
    ):
        criterion.load_state_dict(others)
    for missing in ("gram_0_1", "content_1", "_extra_state"):
        state = with_regions().state_dict()
        del state[missing]
        with pytest.raises(RuntimeError, match=missing):
            criterion.load_state_dict(state)
    assert torch.equal(criterion(f), expected)
    with pytest.raises(RuntimeError, match="unknown"):
        criterion.load_state_dict({**with_regions().state_dict(), "unknown": torch.zeros(1)})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_apart(copied: Callable):
    criterion, f = with_regions(), features(seed=9)
    other, expected = copied(criterion), criterion(f)
    criterion.reset()
    assert torch.equal(other(f), expected)


def test_moves_with_to():
    criterion = with_regions().to("meta")
    assert {t.device.type for t in criterion.buffers()} == {"meta"}
    assert criterion({n: f.to("meta") for n, f in features().items()}).device.type == "meta"


@pytest.mark.filterwarnings("ignore:.*non-meta parameter")
def test_loaded_targets_stay_on_the_device_of_the_module():
    criterion, state = ready().to("meta"), with_regions().state_dict()
    criterion.load_state_dict(state)
    assert {t.device.type for t in criterion.buffers()} == {"meta"}
    assert {t.device.type for t in state.values() if isinstance(t, Tensor)} == {"cpu"}


# ---- transforms --------------------------------------------------------------------------------------------


def test_compiles_to_one_graph_for_all_sizes():
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    criterion = StyleTransferLoss(STYLE, tv_weight=0.1, normalize="none", reduction="gatys")
    criterion.set_style([features(seed=1), features(seed=2)])
    criterion.add_region(torch.rand(12, 16), features(seed=3))
    compiled = torch.compile(criterion, fullgraph=True, dynamic=True, backend=graphs)
    frames = None
    for larger in (0, 6, 16):
        f, image = leaves(features(larger=larger)), torch.rand(1, 3, 12 + larger, 16 + larger)
        got, expected = compiled(f, image, return_terms=True), criterion(f, image, return_terms=True)
        torch.testing.assert_close(got, expected)
        inputs = [f[n] for n in STYLE]
        ours, theirs = (torch.autograd.grad(r.loss, inputs) for r in (got, expected))
        torch.testing.assert_close(ours, theirs)
        frames = frames or graphs.frame_count
    assert graphs.frame_count == frames  # later sizes need no new graph


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    criterion = ready(tv_weight=0.1)
    criterion.add_region(torch.rand(12, 16), features(seed=3))
    f, image = leaves(features(seed=4)), torch.rand(1, 3, 12, 16, dtype=torch.float64)
    compiled = torch.compile(criterion, fullgraph=True)
    results = [function(f, image, return_terms=True) for function in (compiled, criterion)]
    torch.testing.assert_close(*results)
    ours, theirs = (torch.autograd.grad(result.loss, list(f.values())) for result in results)
    torch.testing.assert_close(ours, theirs)


def test_gradients():
    criterion = StyleTransferLoss(["a"], ["a"], style_weight=3.0, tv_weight=1.0, normalize="hw")
    criterion.set_style({"a": torch.randn(1, 2, 3, 3, dtype=torch.float64)})
    criterion.set_content({"a": torch.randn(1, 2, 2, 4, dtype=torch.float64)})
    criterion.add_region(torch.rand(4, 4), {"a": torch.randn(1, 2, 5, 3, dtype=torch.float64)})
    f = torch.randn(2, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    image = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)

    def loss(f: Tensor, image: Tensor) -> Tensor:
        return criterion({"a": f}, image)

    assert torch.autograd.gradcheck(loss, (f, image)) and torch.autograd.gradgradcheck(loss, (f, image))


def test_the_same_bits_from_run_to_run():
    criterion, f = with_regions(), features(seed=9)
    results = []
    for _ in range(3):
        inputs = leaves(f)
        loss = criterion(inputs)
        results.append((loss, *torch.autograd.grad(loss, list(inputs.values()))))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("spatial", [(1,), (1, 1), (1, 1, 1)])
@pytest.mark.parametrize("c", [1, 3])
def test_single_positions_and_channels(spatial, c):
    criterion = StyleTransferLoss(["a"], ["a"], tv_weight=1.0)
    style, given = torch.randn(2, 2, c, *spatial, dtype=torch.float64)
    criterion.set_style({"a": style})
    criterion.set_content({"a": style})
    criterion.add_region(torch.rand([n + 2 for n in spatial]), {"a": style})
    f = given.clone().requires_grad_()
    result = criterion({"a": f}, f, return_terms=True)
    result.loss.backward()
    assert result.loss.isfinite() and f.grad.isfinite().all() and result.total_variation.item() == 0
    expected = 2 * reference.style_loss(given, gram_matrix(style))
    torch.testing.assert_close(result.style, expected)


# ---- presets and options -----------------------------------------------------------------------------------


def test_from_preset_takes_overrides():
    criterion = StyleTransferLoss.from_preset(
        "gatys_paper", style_layers=("a", "b"), content_weight=7.0, distance="l1"
    )
    assert criterion.options["style_layer_weights"] == [1 / 5, 1 / 5]
    assert criterion.options["content_layers"] == ("conv4_2",)
    assert criterion.options["content_weight"] == 7
    assert (criterion.options["reduction"], criterion.options["distance"]) == ("gatys", "l1")
    with pytest.raises(ValueError, match="style_preset: name must be one of"):
        StyleTransferLoss.from_preset("gatys")
    with pytest.raises(TypeError, match="style_wait"):
        StyleTransferLoss.from_preset("gatys_paper", style_wait=1.0)


def test_repr_names_the_options():
    assert repr(StyleTransferLoss(["a"], tv_weight=1)) == (
        "StyleTransferLoss(style_layers=['a'], content_layers=(), style_weight=1.0, content_weight=1.0, "
        "tv_weight=1, style_layer_weights=None, content_layer_weights=None, normalize='chw', "
        "reduction='mean', distance='l2', content_reduction='mean', tv_distance='l2', tv_reduction='mean')"
    )


# ---- errors ------------------------------------------------------------------------------------------------

FLOATS = "float32, float64, bfloat16 or float16"
FEATURES = f"{FLOATS} of shape [B, C, *spatial] with 1 to 3 spatial dimensions, none of size 0"
MASK = f"{FLOATS} or bool of shape [*spatial], [1, *spatial] or [B, *spatial] with "
NAMES = "a list or tuple of layer names, each once"
MAPPING = "a mapping from layer names to tensors"
F = {name: f.float() for name, f in features().items()}
PAIR = {name: f.float() for name, f in features(b=2).items()}


def z(*shape: int, **options) -> Tensor:
    return torch.zeros(shape, **options)


def but(name: str, value: object, given: dict[str, Tensor] = F) -> dict:
    return {**given, name: value}


def construct(*args, **options) -> Callable:
    return lambda: StyleTransferLoss(*args, **options)


def style(*args, **options) -> Callable:
    return lambda: StyleTransferLoss(STYLE).set_style(*args, **options)


def region(*args, **options) -> Callable:
    return lambda: StyleTransferLoss(STYLE).add_region(*args, **options)


def call(
    given: object,
    image: object = None,
    b: int = 1,
    mask: Tensor | None = None,
    style: bool = True,
    content: bool = True,
    **options,
) -> Callable:
    def run():
        weights = {"style_weight": float(style), "content_weight": float(content)}
        criterion = ready(b, tv_weight=0.0 if image is None else 1.0, **weights)
        if mask is not None:
            criterion.add_region(mask, F)
        return criterion(given, None if image == "none" else image, **options)

    return run


ERRORS = [
    (construct("conv1"), TypeError, f'style_layers must be {NAMES}, got "conv1"'),
    (construct(["a", 1]), TypeError, f"style_layers must be {NAMES}, got int 1 among them"),
    (construct(["a"], ["b", "b"]), ValueError, f'content_layers must be {NAMES}, got "b" twice'),
    (construct(()), ValueError, "the terms must be at least one with a weight > 0 and a layer, got none"),
    (construct(["a"], style_weight=0), ValueError,
     "the terms must be at least one with a weight > 0 and a layer, got none"),
    (construct(["a"], style_weight=-1), ValueError,
     "style_weight must be a finite number >= 0, got int -1"),
    (construct(["a"], content_weight=None), TypeError,
     "content_weight must be a finite number >= 0, got None"),
    (construct(["a"], tv_weight=float("inf")), ValueError,
     "tv_weight must be a finite number >= 0, got float inf"),
    (construct(["a"], style_layer_weights=[1, 2]), ValueError,
     "style_layer_weights must be one number per layer of style_layers (1), got 2"),
    (construct(["a"], content_layer_weights=[1]), ValueError,
     "content_layer_weights must be one number per layer of content_layers (0), got 1"),
    (construct(["a"], style_layer_weights=["1"]), TypeError,
     'style_layer_weights[0] must be a finite number, got "1"'),
    (construct(["a"], normalize="c"), ValueError,
     'normalize must be one of "none", "hw", "chw", "bchw" or a finite number > 0, got "c"'),
    (construct(["a"], distance="frobenius"), ValueError,
     'reduction must be "sum" where distance="frobenius", got "mean"'),
    (construct(["a"], content_reduction="none"), ValueError,
     'content_reduction must be one of "mean", "sum", "gatys", got "none"'),
    (construct(["a"], tv_distance="frobenius"), ValueError,
     'tv_distance must be one of "l2", "l1", got "frobenius"'),
    (construct(["a"], tv_reduction="gatys"), ValueError,
     'tv_reduction must be one of "mean", "sum", got "gatys"'),
    (style(F["conv1"]), TypeError, ".set_style: features must be a mapping from layer names to tensors, "
     "or a list or tuple of them, got float32 [1, 3, 12, 16]"),
    (style([]), ValueError, ".set_style: features must be at least one picture, got an empty sequence"),
    (style([F, [F]]), TypeError, f".set_style: features[1] must be {MAPPING}, got list"),
    (style({"conv1": F["conv1"]}), ValueError,
     '.set_style: features must be a mapping with the layer "block.2", got "conv1"'),
    (style({}), ValueError,
     '.set_style: features must be a mapping with the layer "conv1", got an empty mapping'),
    (style(but("conv1", z(3, 4))), ValueError,
     f'.set_style: features["conv1"] must be {FEATURES}, got float32 [3, 4]'),
    (style(but("block.2", z(2, 4, 6, 8))), ValueError, '.set_style: features["block.2"] must be of B=1 '
     'samples and 2 spatial dimensions, as features["conv1"] is, got float32 [2, 4, 6, 8]'),
    (style(but("block.2", z(1, 4, 6))), ValueError, '.set_style: features["block.2"] must be of B=1 '
     'samples and 2 spatial dimensions, as features["conv1"] is, got float32 [1, 4, 6]'),
    (style(but("block.2", z(1, 4, 6, 8, device="meta"))), ValueError, '.set_style: features["block.2"] must '
     'be on cpu, where features["conv1"] is, got float32 [1, 4, 6, 8] on meta'),
    (style([F, but("block.2", z(1, 5, 6, 8))]), ValueError, '.set_style: features[1]["block.2"] must be of '
     '4 channels, as features[0]["block.2"] is, got float32 [1, 5, 6, 8]'),
    (style([F, PAIR, {n: z(3, *f.shape[1:]) for n, f in F.items()}]), ValueError,
     '.set_style: features[2]["conv1"] must be of 1 or 2 samples, as pictures before it are, '
     "got float32 [3, 3, 12, 16]"),
    (style([PAIR, F, {n: z(3, *f.shape[1:]) for n, f in F.items()}]), ValueError,
     '.set_style: features[2]["conv1"] must be of 1 or 2 samples, as pictures before it are, '
     "got float32 [3, 3, 12, 16]"),
    (style([F, {n: f.to("meta") for n, f in F.items()}]), ValueError, '.set_style: features[1]["conv1"] must '
     'be on cpu, where features[0]["conv1"] is, got float32 [1, 3, 12, 16] on meta'),
    (style([F, F], blend_weights=[1]), ValueError,
     ".set_style: blend_weights must be one number per picture of features (2), got 1"),
    (style([F, F], blend_weights=0.5), TypeError,
     ".set_style: blend_weights must be None or a list or tuple of numbers, got float 0.5"),
    (style([F, F], blend_weights=[1, -1]), ValueError,
     ".set_style: blend_weights[1] must be a finite number >= 0, got int -1"),
    (style([F, F], blend_weights=[0, 0.0]), ValueError,
     ".set_style: blend_weights must be of a sum > 0, got a sum of 0"),
    (style([F, F], style_masks=z(12, 16)), TypeError, ".set_style: style_masks must be None or a list or "
     "tuple of 2 tensors or None, as features is, got float32 [12, 16]"),
    (style([F, F], style_masks=[None]), ValueError,
     ".set_style: style_masks must be one tensor or None per picture of features (2), got 1"),
    (style(F, style_masks=z(3, 12, 16)), ValueError, f".set_style: style_masks must be {MASK}B=1, "
     "2 spatial dimensions, none of size 0, got float32 [3, 12, 16]"),
    (style([F, F], style_masks=[None, z(12, 16, device="meta")]), ValueError, ".set_style: style_masks[1] "
     'must be on cpu, where features[1]["conv1"] is, got float32 [12, 16] on meta'),
    (region(z(16), F), ValueError, f".add_region: mask must be {MASK}2 spatial dimensions, none of size 0, "
     "got float32 [16]"),
    (region(z(0, 16), F), ValueError, f".add_region: mask must be {MASK}2 spatial dimensions, none of "
     "size 0, got float32 [0, 16]"),
    (region(None, F), TypeError, f".add_region: mask must be {MASK}2 spatial dimensions, none of size 0, "
     "got None"),
    (region(z(12, 16, dtype=torch.int32), F), TypeError,
     f".add_region: mask must be {MASK}2 spatial dimensions, none of size 0, got int32 [12, 16]"),
    (region(z(12, 16, device="meta"), F), ValueError,
     ".add_region: mask must be on cpu, where the style is, got float32 [12, 16] on meta"),
    (region(z(12, 16), F, weight=-1.0), ValueError,
     ".add_region: weight must be a finite number >= 0, got float -1.0"),
    (lambda: ready().set_content([F]), TypeError, f".set_content: features must be {MAPPING}, got list"),
    (lambda: ready().set_content({}), ValueError,
     '.set_content: features must be a mapping with the layer "block.2", got an empty mapping'),
    (lambda: StyleTransferLoss(STYLE)(F), ValueError,
     "the style must be set by set_style or add_region, got none"),
    (lambda: StyleTransferLoss((), CONTENT)(F), ValueError,
     "the content must be set by set_content, got none"),
    (call(list(F.values())), TypeError, f"features must be {MAPPING}, got list"),
    (call({"conv1": F["conv1"], "conv3": F["conv3"]}), ValueError,
     'features must be a mapping with the layer "block.2", got "conv1", "conv3"'),
    (call(but("conv1", None)), TypeError, f'features["conv1"] must be {FEATURES}, got None'),
    (call(but("conv1", z(1, 5, 12, 16))), ValueError,
     'features["conv1"] must be of 3 channels, as those of the style were, got float32 [1, 5, 12, 16]'),
    (call({n: z(3, *f.shape[1:]) for n, f in F.items()}, b=2), ValueError,
     'features["conv1"] must be of B=2 samples, as many styles as there are, got float32 [3, 3, 12, 16]'),
    (call(but("conv3", z(1, 5, 3, 5))), ValueError,
     'features["conv3"] must be of the shape of the content [1, 5, 3, 4], got float32 [1, 5, 3, 5]'),
    (call(PAIR, mask=z(3, 12, 16)), ValueError, "mask of region 1 must be of shape [1 or B, *spatial] to "
     'match features["conv1"] [2, 3, 12, 16], got float32 [3, 12, 16]'),
    (call({n: f.flatten(2) for n, f in F.items()}, mask=z(12, 16), content=False), ValueError,
     'mask of region 1 must be of shape [1 or B, *spatial] to match features["conv1"] [1, 3, 192], '
     "got float32 [1, 12, 16]"),
    (call({n: z(3, *f.shape[1:]) for n, f in F.items()}, b=2, style=False), ValueError,
     'features["block.2"] must be of the shape of the content [2, 4, 6, 8], got float32 [3, 4, 6, 8]'),
    (call({n: f.to("meta") for n, f in F.items()}, style=False), ValueError,
     'features["block.2"] must be on cpu, where the content is, got float32 [1, 4, 6, 8] on meta'),
    (call({n: f.to("meta") for n, f in F.items()}), ValueError,
     'features["conv1"] must be on cpu, where the style is, got float32 [1, 3, 12, 16] on meta'),
    (call(F, "none"), TypeError, f"image must be {FEATURES}, got None"),
    (call(F, z(3, 4)), ValueError, f"image must be {FEATURES}, got float32 [3, 4]"),
    (call(F, return_terms=1), TypeError, "return_terms must be True or False, got int 1"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "kind", "message"), ERRORS, ids=[e[2][:90] for e in ERRORS])
def test_errors(run: Callable, kind: type[Exception], message: str):
    with pytest.raises((TypeError, ValueError)) as raised:
        run()
    expected = f"StyleTransferLoss{message}" if message[0] == "." else f"StyleTransferLoss: {message}"
    assert str(raised.value) == expected and type(raised.value) is kind


def test_what_raises_leaves_the_targets_as_they_were():
    criterion, f = with_regions(), features(seed=9)
    expected = criterion(f)
    for wrong in (
        lambda: criterion.set_style([F, F], blend_weights=[1]),
        lambda: criterion.add_region(z(3), F),
        lambda: criterion.set_content({"block.2": F["block.2"]}),
    ):
        with pytest.raises(ValueError):
            wrong()
        assert torch.equal(criterion(f), expected)
