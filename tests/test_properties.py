"""What holds for all batches and features: any shape, dtype, label pattern, offset, scale, layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepsim_ext import (
    GramAccumulator,
    batch_hard_mine,
    batch_hard_triplet_loss,
    content_loss,
    contrastive_loss,
    gram_matrix,
    reference,
    style_loss,
)

from .samples import DISTANCES, DTYPES, TRIPLET_REDUCTIONS

# Of a norm: rounding of the arithmetic, and of the result to the gradient's dtype.
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 5e-3, torch.float16: 1e-3}
INT64 = torch.iinfo(torch.int64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


# ---- batches -----------------------------------------------------------------------------------------------


@dataclass
class Batch:
    x: Tensor
    labels: Tensor
    ref: Tensor | None
    ref_labels: Tensor | None

    @property
    def sets(self) -> tuple[Tensor | None, ...]:
        return self.x, self.labels, self.ref, self.ref_labels

    @property
    def candidates(self) -> tuple[Tensor, Tensor]:
        return (self.x, self.labels) if self.ref is None else (self.ref, self.ref_labels)

    def same(self) -> Tensor:
        """[N, M] bool: same label."""
        return self.labels[:, None] == self.candidates[1][None, :]

    def allowed(self) -> Tensor:
        """[N, M] bool: same label and not the anchor itself."""
        same = self.same()
        return same.fill_diagonal_(False) if self.ref is None and len(same) else same

    def exact(self) -> list[Tensor]:
        """The embeddings as float64 leaves."""
        return [t.to(torch.float64, copy=True).requires_grad_() for t in (self.x, self.ref) if t is not None]

    def ours(self) -> list[Tensor]:
        """The embeddings as leaves of their own dtype."""
        return [t.clone().requires_grad_() for t in (self.x, self.ref) if t is not None]

    def call(self, function, sets: list[Tensor], **options):
        ref = sets[1] if self.ref is not None else None
        return function(sets[0], self.labels, ref, self.ref_labels, **options)


def draw_labels(pattern: str, n: int, g: torch.Generator) -> Tensor:
    if pattern == "one_class":
        return torch.zeros(n, dtype=torch.int64)
    if pattern == "singletons":
        return torch.randperm(n, generator=g)
    if pattern == "pairs":
        return torch.randperm(n, generator=g) // 2
    if pattern == "imbalance":  # nine of ten rows in one class
        return torch.where(torch.rand(n, generator=g) < 0.9, 0, torch.randint(40, (n,), generator=g))
    return torch.randint(5, (n,), generator=g)


def rename(labels: Tensor, names: str, g: torch.Generator) -> Tensor:
    """An injective map of labels below 1000."""
    if names == "as_drawn":
        return labels
    if names == "beyond_32_bits":  # equal modulo 2^32
        return labels * 2**32 - 2**40
    table = torch.randint(INT64.min, INT64.max, (1000,), generator=g)
    table[:2] = torch.tensor([INT64.max, INT64.min])
    return table[labels]


NAMES = ("as_drawn", "beyond_32_bits", "any_int64")


@st.composite
def batches(draw, dtypes=DTYPES, with_ref=(False, True), patterns=None, plain=False) -> Batch:
    """Up to 200 rows of up to 70 columns. `plain` leaves out duplicates and zero rows, which tie."""
    dtype = draw(st.sampled_from(dtypes))
    d = draw(st.integers(2 if plain else 1, 70))
    common = ("few", "pairs", "imbalance")
    pattern = draw(st.sampled_from(patterns or (*common, *common, "one_class", "singletons")))
    names = draw(st.sampled_from(NAMES))
    has_ref = draw(st.sampled_from(with_ref))
    duplicates, zeros = (False, False) if plain else (draw(st.booleans()), draw(st.booleans()))
    wide = dtype in (torch.float32, torch.float64)
    offset = draw(st.sampled_from((0.0, 100.0 if wide else 2.0)))
    # float16 spans so few decades that small rows would be all duplicates of zero.
    scale = 10.0 ** draw(st.integers(*((-6, 6) if dtype is not torch.float16 else (-1, 1))))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def rows(n: int) -> Tensor:
        x = torch.randn(n, d, generator=g, dtype=torch.float64) + offset
        if duplicates and n:
            x = x[torch.randint(max(1, n // 3), (n,), generator=g)]
        if zeros:
            x[torch.rand(n, generator=g) < 0.1] = 0
        return (x * scale).to(dtype)

    n = draw(st.one_of(st.integers(10, 200), st.integers(0, 200)))
    batch = [rows(n), draw_labels(pattern, n, g), None, None]
    if has_ref:
        m = draw(st.one_of(st.integers(10, 200), st.integers(0, 200)))
        batch[2:] = rows(m), draw_labels(pattern, m, g)
    seed = draw(st.integers(0, 2**16))  # the same names on both sides
    batch[1], batch[3] = (
        t if t is None else rename(t, names, torch.Generator().manual_seed(seed))
        for t in (batch[1], batch[3])
    )
    return Batch(*batch)


distances = st.sampled_from(DISTANCES)


def squared_distances(batch: Batch, distance: str) -> tuple[Tensor, float]:
    """[N, M] float64 squared distances, and the largest centred squared norm, of what is searched."""
    x, y = batch.x.double(), batch.candidates[0].double()
    if distance == "cosine":
        zero = (x.square().sum(1) == 0)[:, None] | (y.square().sum(1) == 0)[None, :]
        x, y = torch.nn.functional.normalize(x, eps=1e-300), torch.nn.functional.normalize(y, eps=1e-300)
    center = (x.mean(0) + y.mean(0)) / 2
    largest = max((t - center).square().sum(1).max().item() for t in (x, y))
    squared = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return (squared.masked_fill(zero, 2.0) if distance == "cosine" else squared), largest


@given(batches(), distances)
@settings(max_examples=120)
def test_mined_triplets_are_valid_and_the_hardest(batch, distance):
    anchors, positives, negatives = batch_hard_mine(*batch.sets, distance=distance)
    same, allowed = batch.same(), batch.allowed()
    assert torch.equal(anchors, (allowed.any(1) & (~same).any(1)).nonzero().squeeze(1))
    if not len(anchors):
        event("nobody is valid")
        return
    assert allowed[anchors, positives].all()
    assert not same[anchors, negatives].any()
    # Within 1e-5 of the largest centred squared norm of the best; so, where that is clear, the best itself.
    squared, largest = squared_distances(batch, distance)
    gap = (1e-13 if batch.x.dtype is torch.float64 else 1e-5) * largest
    squared, same, allowed = squared[anchors], same[anchors], allowed[anchors]
    rows = torch.arange(len(anchors))
    farthest = squared.masked_fill(~allowed, -torch.inf).amax(1)
    nearest = squared.masked_fill(same, torch.inf).amin(1)
    assert (farthest - squared[rows, positives] <= gap).all()
    assert (squared[rows, negatives] - nearest <= gap).all()
    # Of identical rows the first: no twin of the choice with a lower index may be chosen.
    candidates = batch.candidates[0]
    twins = (
        torch.cdist(candidates.double(), candidates.double(), compute_mode="donot_use_mm_for_euclid_dist")
        == 0
    )
    earlier = torch.arange(len(candidates))[None, :]
    assert not (twins[positives] & allowed & (earlier < positives[:, None])).any()
    assert not (twins[negatives] & ~same & (earlier < negatives[:, None])).any()


@given(
    batches(), distances, st.sampled_from(TRIPLET_REDUCTIONS), st.booleans(), st.sampled_from((0.3, 1.1, 1e3))
)
@settings(max_examples=120)
def test_loss_and_gradient_are_those_of_the_mined_triplets(batch, distance, reduction, soft, margin):
    """Against the float64 reference on the triplets that were mined: near-ties don't blur the comparison."""
    dtype = batch.x.dtype
    options = {"margin": margin, "soft": soft, "distance": distance, "reduction": reduction}
    ours, exact = batch.ours(), batch.exact()
    anchors, *mined = batch_hard_mine(*batch.sets, distance=distance)
    chosen = [torch.full((len(batch.x),), -1).index_copy(0, anchors, c) for c in mined]
    got = batch.call(batch_hard_triplet_loss, ours, **options)
    expected = reference.indexed_triplet_loss(
        exact[0], exact[1] if len(exact) > 1 else None, *chosen, **options
    )
    assert got.dtype == compute_dtype(dtype)
    assert got.shape == expected.shape

    rounding = ROUNDING[compute_dtype(dtype)]
    count = max(len(anchors), 1)
    longest = squared_distances(batch, distance)[0].max().item() if len(anchors) else 0.0
    longest = {"euclidean": longest**0.5, "sqeuclidean": longest, "cosine": longest / 2}[distance]
    terms = count if reduction == "sum" else 1
    torch.testing.assert_close(
        got.double(), expected, rtol=rounding, atol=rounding * terms * (longest + margin)
    )

    incoming = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).double()
    grads = torch.autograd.grad(expected, exact, incoming)
    # A power of two, as a gradient scaler has: 16-bit gradients stay normal numbers.
    largest = max((g.abs().max().item() for g in grads if g.numel()), default=0.0)
    scale = 2.0 ** torch.tensor(largest).log2().round().neg().item() if largest else 1.0
    got.backward((incoming * scale).to(got.dtype))
    # The parts of a gradient may cancel; their rounding does not.
    norms = torch.cat([t.detach().double().norm(dim=1) for t in ours])
    shortest = norms[norms > 0].min().item() if (norms > 0).any() else 1.0
    slope = {"euclidean": 1.0, "sqeuclidean": 2 * longest**0.5, "cosine": 1 / shortest}[distance]
    parts = slope * scale * count**0.5 / (1 if reduction in ("sum", "none") else count)
    parts *= incoming.abs().max().item() if incoming.numel() else 0.0
    for x, g in zip(ours, grads, strict=True):
        assert x.grad.dtype == dtype
        error = (x.grad.double() - g * scale).norm()
        assert error <= ROUNDING[dtype] * g.norm() * scale + 2 * rounding * parts


@given(batches(dtypes=(torch.float64,)), distances, st.sampled_from(TRIPLET_REDUCTIONS), st.booleans())
def test_loss_and_statistics_equal_the_reference(batch, distance, reduction, soft):
    options = {
        "margin": 0.3,
        "soft": soft,
        "distance": distance,
        "reduction": reduction,
        "return_stats": True,
    }
    got, expected = (
        f(*batch.sets, **options) for f in (batch_hard_triplet_loss, reference.batch_hard_triplet_loss)
    )
    scale = max(expected.mean_d_ap.item(), expected.mean_d_an.item(), 1.0) * max(len(batch.x), 1)
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * scale)


@given(batches(dtypes=(torch.float64,), plain=True), distances, st.integers(0, 99))
def test_permuting_the_rows_permutes_the_choice(batch, distance, seed):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(batch.x), generator=g)
    ref_order = order if batch.ref is None else torch.randperm(len(batch.ref), generator=g)
    ref, ref_labels = (
        (None, None) if batch.ref is None else (batch.ref[ref_order], batch.ref_labels[ref_order])
    )
    anchors, positives, negatives = batch_hard_mine(*batch.sets, distance=distance)
    permuted = batch_hard_mine(batch.x[order], batch.labels[order], ref, ref_labels, distance=distance)
    there = order[permuted[0]].argsort()
    assert torch.equal(order[permuted[0]][there], anchors)
    assert torch.equal(ref_order[permuted[1]][there], positives)
    assert torch.equal(ref_order[permuted[2]][there], negatives)


def everything(batch: Batch, distance: str, **options) -> list[Tensor]:
    """Indices, loss of every anchor, gradients: what must not change by a bit."""
    sets = batch.ours()
    loss = batch.call(batch_hard_triplet_loss, sets, distance=distance, reduction="none", **options)
    return [
        *batch_hard_mine(*batch.sets, distance=distance),
        loss.detach(),
        *torch.autograd.grad(loss.sum(), sets),
    ]


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@given(batches(), distances, st.sampled_from(NAMES), st.integers(0, 99))
def test_names_of_labels_do_not_matter(batch, distance, names, seed):
    """Not even where there are ties, although labels decide the order of the search."""
    every = torch.cat([batch.labels, batch.candidates[1]])
    ranks = every.unique(return_inverse=True)[1]
    renamed = rename(
        ranks.max().sub(ranks) if len(ranks) else ranks, names, torch.Generator().manual_seed(seed)
    )
    n = len(batch.labels)
    other = Batch(batch.x, renamed[:n], batch.ref, None if batch.ref is None else renamed[n:])
    assert_same_bits(everything(batch, distance), everything(other, distance))


@given(batches(), distances, st.integers(0, 99))
def test_reflections_are_exact(batch, distance, seed):
    signs = torch.randint(2, (batch.x.shape[1],), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    signs = signs.to(batch.x.dtype)
    mirrored = Batch(
        batch.x * signs, batch.labels, None if batch.ref is None else batch.ref * signs, batch.ref_labels
    )
    ours, other = everything(batch, distance), everything(mirrored, distance)
    assert_same_bits(ours, [*other[:4], *(g * signs for g in other[4:])])


@given(batches(dtypes=(torch.float32, torch.float64, torch.bfloat16)), distances, st.integers(-6, 6))
def test_powers_of_two_are_exact(batch, distance, exponent):
    factor = 2.0**exponent
    scaled = Batch(
        batch.x * factor, batch.labels, None if batch.ref is None else batch.ref * factor, batch.ref_labels
    )
    power = {"euclidean": 1, "sqeuclidean": 2, "cosine": 0}[distance]
    ours = everything(batch, distance, margin=0.5)
    other = everything(scaled, distance, margin=0.5 * factor**power)
    assert_same_bits(
        [*ours[:3], ours[3] * factor**power, *(g * factor ** (power - 1) for g in ours[4:])], other
    )


@given(
    batches(dtypes=(torch.float64,), plain=True),
    st.sampled_from(("euclidean", "sqeuclidean")),
    st.integers(0, 99),
)
def test_exact_translations_and_rotations(batch, distance, seed):
    """Coordinates on a grid, so that a shift rounds nothing; a permutation of the columns is a rotation."""
    g = torch.Generator().manual_seed(seed)
    d = batch.x.shape[1]
    shift = torch.randint(-1000, 1000, (d,), generator=g).double()

    def on_grid(t: Tensor | None) -> Tensor | None:
        return t if t is None else torch.randint(-(2**30), 2**30, t.shape, generator=g).double() / 2**24

    start = Batch(on_grid(batch.x), batch.labels, on_grid(batch.ref), batch.ref_labels)
    moved = Batch(
        start.x + shift, start.labels, None if start.ref is None else start.ref + shift, start.ref_labels
    )
    assert_same_bits(everything(start, distance), everything(moved, distance))
    columns = torch.randperm(d, generator=g)
    turned = Batch(
        start.x[:, columns],
        start.labels,
        None if start.ref is None else start.ref[:, columns],
        start.ref_labels,
    )
    ours, other = everything(start, distance), everything(turned, distance)
    assert_same_bits(ours[:3], other[:3])
    torch.testing.assert_close(ours[3], other[3], rtol=1e-13, atol=1e-10)


@given(batches(with_ref=(False,), patterns=("few", "pairs", "imbalance"), plain=True), distances)
def test_a_copy_as_reference_set_is_the_self_form_but_for_self_pairs(batch, distance):
    """No row has a twin, so where an anchor has another positive than itself both forms find the same."""
    x, labels = batch.x, batch.labels
    if len(x.unique(dim=0)) < len(x):
        event("16-bit twins")
        return
    copied = Batch(x, labels, x.clone(), labels)
    anchors, positives, negatives = batch_hard_mine(*batch.sets, distance=distance)
    ref_anchors, ref_positives, ref_negatives = batch_hard_mine(*copied.sets, distance=distance)
    have_others = torch.isin(ref_anchors, anchors)
    assert torch.equal(ref_anchors[have_others], anchors)
    assert torch.equal(ref_positives[have_others], positives)
    assert torch.equal(ref_negatives[have_others], negatives)
    assert torch.equal(ref_positives[~have_others], ref_anchors[~have_others])  # alone: itself
    assert_same_bits(
        [anchors, positives, negatives], batch_hard_mine(x, labels, x, labels, distance=distance)
    )


@given(batches(dtypes=(torch.float64,), with_ref=(False,), plain=True), distances)
def test_the_self_gradient_is_the_sum_of_both_sets_gradients(batch, distance):
    x = batch.x[: len(batch.x) // 2 * 2]
    labels = torch.arange(len(x)) // 2  # nobody is alone and could only choose itself
    own = everything(Batch(x, labels, None, None), distance)[-1]
    *_, anchors_part, references_part = everything(Batch(x, labels, x.clone(), labels), distance)
    torch.testing.assert_close(
        anchors_part + references_part, own, rtol=1e-10, atol=1e-10 * max(own.norm().item(), 1e-300)
    )


@given(batches(dtypes=(torch.float32, torch.float64)), st.sampled_from(("euclidean", "sqeuclidean")))
def test_gradient_rows_add_up_to_zero(batch, distance):
    """Shifting all points together changes no distance between them."""
    grads = everything(batch, distance)[4:]
    total = sum(g.double().sum(0) for g in grads)
    size = sum(g.double().abs().sum(0) for g in grads)
    assert (total.abs() <= 20 * ROUNDING[batch.x.dtype] * size.max()).all() if len(size) else True


@given(batches(dtypes=(torch.float32, torch.float64)))
def test_cosine_gradients_are_tangents(batch):
    """Stretching a row changes no angle."""
    for x, g in zip((batch.x, batch.ref), everything(batch, "cosine")[4:], strict=False):
        along = (x.double() * g.double()).sum(1).abs()
        size = x.double().norm(dim=1) * (g.double().norm(dim=1))
        uses = 2 * len(batch.x) + 2  # |x| |dcos/dx| <= 1 of each, however much of it cancels
        assert (along <= 2 * ROUNDING[x.dtype] * (size + uses)).all()


@given(
    batches(),
    distances,
    st.sampled_from(TRIPLET_REDUCTIONS),
    st.sampled_from((torch.nan, torch.inf, -torch.inf)),
    st.data(),
)
def test_one_nan_or_inf_anywhere_makes_the_loss_nan(batch, distance, reduction, bad, data):
    sets = batch.ours()
    filled = [t for t in sets if len(t)]
    if not filled:
        return
    with torch.no_grad():
        data.draw(st.sampled_from(filled)).view(-1)[data.draw(st.integers(0, 10**4)) % filled[0].shape[1]] = (
            bad
        )
    loss = batch.call(batch_hard_triplet_loss, sets, distance=distance, reduction=reduction)
    assert loss.isnan().all()
    assert len(batch.call(batch_hard_mine, sets, distance=distance)[0]) == 0


# ---- features ----------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "channels_last", "batch_inside", "sliced", "expanded")


@st.composite
def feature_maps(draw, dtypes=DTYPES) -> Tensor:
    """[B, C, *spatial] with up to 70 channels and 2000 positions, in any layout, signed or after a ReLU."""
    dtype = draw(st.sampled_from(dtypes))
    b, c = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    spatial = draw(st.sampled_from(((1,), (7,), (1300,), (1, 1), (5, 6), (31, 37), (2, 3, 4), (9, 10, 11))))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    f = torch.randn(b, c, *spatial, generator=g, dtype=torch.float64) * 10.0 ** draw(st.integers(-2, 2))
    f = (f.relu() if draw(st.booleans()) else f).to(dtype)
    layout = draw(st.sampled_from(LAYOUTS))
    if layout == "channels_last":
        return f.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "batch_inside":
        return f.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return f.repeat_interleave(2, 1).repeat_interleave(3, -1)[:, ::2, ..., ::3]
    return f[:1].expand_as(f) if layout == "expanded" else f


def leaves(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features as a leaf in their own layout, and as a float64 leaf."""
    own = features.clone(memory_format=torch.preserve_format).requires_grad_()
    return own, features.to(torch.float64, copy=True).requires_grad_()


normalizations = st.sampled_from(("none", "hw", "chw", "bchw", 37.5))


@given(feature_maps(), normalizations)
def test_gram_is_symmetric_positive_semidefinite_and_the_reference(features, normalize):
    f, exact = leaves(features)
    gram, expected = gram_matrix(f, normalize=normalize), reference.gram_matrix(exact, normalize=normalize)
    rounding = ROUNDING[gram.dtype]
    assert torch.equal(gram, gram.mT)
    eigenvalues = torch.linalg.eigvalsh(gram.detach().double())
    assert (eigenvalues >= -10 * rounding * eigenvalues.amax(1, keepdim=True).abs()).all()
    assert (gram - expected).norm() <= rounding * expected.norm()
    incoming = torch.randn(gram.shape, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
    (grad,) = torch.autograd.grad(expected, exact, incoming.double())
    scale = 2.0 ** grad.abs().max().log2().round().neg().item() if grad.any() else 1.0
    gram.backward(incoming * scale)
    assert (f.grad.double() - grad * scale).norm() <= 2 * ROUNDING[f.dtype] * grad.norm() * scale


@given(feature_maps(), st.integers(0, 99))
def test_gram_does_not_see_the_order_of_positions_nor_their_layout(features, seed):
    f = features.flatten(2)
    gram = gram_matrix(f)
    assert torch.equal(gram_matrix(features.contiguous()), gram)
    assert torch.equal(gram_matrix(f.transpose(1, 2).contiguous().transpose(1, 2)), gram)
    order = torch.randperm(f.shape[2], generator=torch.Generator().manual_seed(seed))
    assert (gram_matrix(f[:, :, order]) - gram).norm() <= ROUNDING[gram.dtype] * gram.norm()


@given(feature_maps(), st.integers(1, 50))
def test_gram_is_the_sum_over_chunks_of_positions(features, chunk):
    f = features.flatten(2)
    gram = gram_matrix(f, normalize="none")
    parts = sum(gram_matrix(part, normalize="none") for part in f.split(max(chunk, f.shape[2] // 8), dim=2))
    assert (parts - gram).norm() <= ROUNDING[gram.dtype] * gram.norm()


@given(feature_maps(), normalizations, st.integers(1, 50))
def test_accumulated_chunks_are_the_whole_and_so_is_their_gradient(features, normalize, chunk):
    f, exact = leaves(features)
    parts = f.flatten(2).split(max(chunk, f[0, 0].numel() // 8), dim=2)
    accumulator = GramAccumulator(normalize=normalize)
    with torch.no_grad():
        for part in parts:
            accumulator.update(part)
    gram, expected = accumulator.result(), reference.gram_matrix(exact, normalize=normalize)
    rounding = ROUNDING[gram.dtype]
    assert (gram - expected).norm() <= 2 * rounding * expected.norm()
    incoming = torch.randn(gram.shape, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
    (grad,) = torch.autograd.grad(expected, exact, incoming.double())
    scale = 2.0 ** grad.abs().max().log2().round().neg().item() if grad.any() else 1.0
    torch.autograd.backward(parts, [accumulator.gradient(part, incoming * scale) for part in parts])
    assert (f.grad.double() - grad * scale).norm() <= 2 * ROUNDING[f.dtype] * grad.norm() * scale


@given(feature_maps(), normalizations, st.integers(0, 99))
def test_gram_of_a_region_is_that_of_its_positions_alone(features, normalize, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(features.shape[2:], generator=g) < 0.5
    gram = gram_matrix(features, normalize=normalize, mask=mask)
    if not mask.any():
        assert not gram.any()
        return
    n, inside = mask.numel(), features.flatten(2)[:, :, mask.flatten()]
    expected = reference.gram_matrix(inside.double(), normalize="hw")
    expected *= n / _divisor(features, normalize)
    assert (gram - expected).norm() <= 3 * ROUNDING[gram.dtype] * expected.norm()


def _divisor(features: Tensor, normalize: str | float) -> float:
    b, c, n = features.flatten(2).shape
    return {"none": 1, "hw": n, "chw": c * n, "bchw": b * c * n}.get(normalize, normalize)


differences = st.one_of(
    st.tuples(st.sampled_from(("l2", "l1")), st.sampled_from(("mean", "sum", "gatys"))),
    st.just(("frobenius", "sum")),
)


@given(feature_maps(), normalizations, differences)
def test_style_loss_vanishes_at_its_own_gram(features, normalize, difference):
    distance, reduction = difference
    f, _ = leaves(features)
    target = gram_matrix(features, normalize=normalize)
    loss = style_loss(f, target, normalize=normalize, distance=distance, reduction=reduction)
    loss.backward()
    assert loss.item() == 0
    assert not f.grad.any()


@given(feature_maps(), differences, st.booleans())
def test_style_loss_equals_the_reference(features, difference, shared):
    distance, reduction = difference
    f, exact = leaves(features)
    b, c = f.shape[:2]
    g = torch.Generator().manual_seed(1)
    # In proportion to the Gram matrix and well below it: the residual is none of rounding.
    target = gram_matrix(features) * (torch.rand(b, c, c, generator=g) / 2).to(compute_dtype(f.dtype))
    target = target[:1] if shared else target
    options = {"distance": distance, "reduction": reduction}
    got, expected = style_loss(f, target, **options), reference.style_loss(exact, target.double(), **options)
    rounding = ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=20 * rounding, atol=0)
    (grad,) = torch.autograd.grad(expected, exact)
    scale = 2.0 ** grad.abs().max().log2().round().neg().item() if grad.any() else 1.0
    got.backward(torch.tensor(scale, dtype=got.dtype))
    assert (f.grad.double() - grad * scale).norm() <= (
        ROUNDING[f.dtype] + 20 * rounding
    ) * grad.norm() * scale


@given(st.lists(feature_maps(dtypes=(torch.float64,)), min_size=1, max_size=4), st.data())
@settings(max_examples=40)
def test_layer_weights_are_linear(features, data):
    weights = [data.draw(st.sampled_from((0.0, 0.5, 1.0, -3.0))) for _ in features]
    grams = [torch.zeros(f.shape[1], f.shape[1], dtype=torch.float64) for f in features]
    for loss, targets in ((style_loss, grams), (content_loss, [f * 0.5 for f in features])):
        together = loss(features, targets, weights=weights)
        apart = [loss(f, t) for f, t in zip(features, targets, strict=True)]
        expected = sum(w * one for w, one in zip(weights, apart, strict=True))
        torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12 * sum(apart).item())


# ---- pairs -------------------------------------------------------------------------------------------------


@given(
    batches(with_ref=(False,)), st.sampled_from(("mean", "sum", "none")), st.sampled_from((0.0, 1.0, 50.0))
)
def test_contrastive_loss_equals_the_reference(batch, reduction, margin):
    y = torch.arange(len(batch.x)) % 2
    ours = [t.clone().requires_grad_() for t in (batch.x, batch.x.flip(0))]
    exact = [t.detach().double().requires_grad_() for t in ours]
    options = {"margin": margin, "reduction": reduction}
    got, expected = contrastive_loss(*ours, y, **options), reference.contrastive_loss(*exact, y, **options)
    rounding = ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=20 * rounding, atol=rounding * margin**2)
    for x, g in zip(
        torch.autograd.grad(got.sum(), ours), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        if x.dtype is not torch.float16:  # gradients of one pair in thousands may be subnormal there
            assert (x.double() - g).norm() <= ROUNDING[x.dtype] * 20 * max(g.norm().item(), rounding * margin)
