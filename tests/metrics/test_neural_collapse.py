"""The measures against their definitions in NumPy, at values that are known, in streams, and on bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_fed.metrics import ClassMoments, NearestCentreAgreement, NeuralCollapse, orthogonal_frame_norms

AT_COLLAPSE = ("nc1", "nc1_trace", "cdnv", "nc2_etf", "nc2_equinorm", "nc2_equiangle", "nc3", "nc3_etf")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simplex(num_classes: int, num_features: int, norm: float = 1.0) -> Tensor:
    """Rows of an ETF, float64 ``[C, d]``."""
    basis = torch.randn(num_features, num_classes, generator=generator(9), dtype=torch.float64)
    rows = (torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes) @ torch.linalg.qr(basis)[0].T
    return norm * rows / rows.norm(dim=1, keepdim=True)


def around(means: Tensor, per_class: int, sigma: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Isotropic samples around class means."""
    labels = torch.arange(len(means)).repeat(per_class)
    noise = torch.randn(len(labels), means.shape[1], generator=generator(seed), dtype=torch.float64)
    return means[labels] + sigma * noise, labels


def measured(
    features: Tensor, labels: Tensor, num_classes: int, *classifier: Tensor, **settings: Any
) -> dict[str, float]:
    metric = NeuralCollapse(num_classes, features.shape[1], **settings)
    metric.update(features, labels)
    return {name: float(value) for name, value in metric.compute(*classifier).items()}


def naive(
    features: Tensor, labels: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> dict[str, float]:
    """The definitions, written out on all features in float64 with ``pinv``; all classes must have samples."""
    h, y = features.double().numpy(), labels.numpy()
    number, d = y.max() + 1, h.shape[1]
    mu = np.stack([h[y == c].mean(0) for c in range(number)])
    m = mu - mu.mean(0)
    within = (h - mu[y]).T @ (h - mu[y]) / len(h)
    between = sum(np.outer(row, row) for row in m) / number
    v = [np.var(h[y == c], axis=0).sum() for c in range(number)]
    pairs = [(i, j) for i in range(number) for j in range(number) if i != j]
    cosines = [m[i] @ m[j] / np.linalg.norm(m[i]) / np.linalg.norm(m[j]) for i, j in pairs]
    etf = (np.eye(number) - 1 / number) / np.sqrt(number - 1)
    norms = np.linalg.norm(m, axis=1)
    spectrum = np.linalg.eigvalsh(between)[-min(number - 1, d) :]
    shares = spectrum / spectrum.sum()
    rtol = max(number, d) * np.finfo(np.float64).eps
    found = {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=rtol, hermitian=True)) / number,
        "nc1_trace": np.trace(within) / np.trace(between),
        "cdnv": np.mean([(v[i] + v[j]) / (2 * np.sum((mu[i] - mu[j]) ** 2)) for i, j in pairs]),
        "nc2_etf": np.linalg.norm(m @ m.T / np.linalg.norm(m @ m.T) - etf),
        "nc2_equinorm": norms.std() / norms.mean(),
        "nc2_equiangle": np.mean([abs(cosine + 1 / (number - 1)) for cosine in cosines]),
        "nc2_of": np.linalg.norm(mu @ mu.T / np.linalg.norm(mu @ mu.T) - np.eye(number) / np.sqrt(number)),
        "effective_rank": np.exp(-np.sum(shares * np.log(shares))),
    }
    if weight is not None and bias is not None:
        w, b = weight.double().numpy(), bias.double().numpy()
        c = w - w.mean(0)
        lengths = np.linalg.norm(c, axis=1)
        angles = [c[i] @ c[j] / lengths[i] / lengths[j] for i, j in pairs]
        found |= {
            "nc3": np.linalg.norm(w / np.linalg.norm(w) - m / np.linalg.norm(m)),
            "nc3_etf": np.linalg.norm(w @ m.T / np.linalg.norm(w @ m.T) - etf),
            "nc2_weight_etf": np.linalg.norm(c @ c.T / np.linalg.norm(c @ c.T) - etf),
            "nc2_weight_equinorm": lengths.std() / lengths.mean(),
            "nc2_weight_equiangle": np.mean([abs(cosine + 1 / (number - 1)) for cosine in angles]),
            "bias_residual": np.linalg.norm(w @ mu.mean(0) + b),
        }
    return {name: float(value) for name, value in found.items()}


def random_problem(num_classes: int, num_features: int, count: int = 600) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features with an offset and unequal classes, and a classifier."""
    draw = {"generator": generator(1), "dtype": torch.float64}
    weights = torch.linspace(1, 5, num_classes)
    labels = torch.cat([torch.arange(num_classes), torch.multinomial(weights, count, True, generator=generator(2))])
    means = torch.randn(num_classes, num_features, **draw) + 2
    features = means[labels] + 0.3 * torch.randn(len(labels), num_features, **draw)
    return features, labels, torch.randn(num_classes, num_features, **draw), torch.randn(num_classes, **draw)


# ------------------------------------------------------------------------------------------------------- known values


@pytest.mark.parametrize(("num_classes", "num_features"), [(10, 64), (100, 128), (2, 3), (4, 4)])
def test_an_exact_simplex_has_collapsed(num_classes: int, num_features: int) -> None:
    weight = simplex(num_classes, num_features, norm=3.0)
    offset = torch.randn(num_features, generator=generator(5), dtype=torch.float64)
    features, labels = around(weight + offset, 5, sigma=0)
    found = measured(features.float(), labels, num_classes, weight, -weight @ offset)
    for name in (*AT_COLLAPSE, "nc2_weight_etf", "bias_residual"):
        assert found[name] == pytest.approx(0, abs=1e-6), name
    assert found["effective_rank"] == pytest.approx(num_classes - 1)
    metric = ClassMoments(num_classes, num_features)
    metric.update(features, labels)
    nearest = NearestCentreAgreement(metric.compute().means)
    nearest.update(features, features @ weight.T - weight @ offset)
    assert nearest.compute() == 0


def test_isotropic_noise_around_a_simplex() -> None:
    """sigma^2 (C-1)^2 / (C a^2), sigma^2 d / a^2 and sigma^2 d (C-1) / (2 a^2 C), up to 1/n."""
    features, labels = around(simplex(10, 64, norm=3.0), 1000, sigma=0.1)
    found = measured(features, labels, 10)
    assert found["nc1"] == pytest.approx(0.01 * 81 / 90, rel=0.01)
    assert found["nc1_trace"] == pytest.approx(0.01 * 64 / 9, rel=0.01)
    assert found["cdnv"] == pytest.approx(0.01 * 64 * 9 / 180, rel=0.01)


@pytest.mark.parametrize(("number", "n"), [(10, 1000), (50, 200)])
def test_random_features_and_labels(number: int, n: int) -> None:
    """(n-1)(C-1)/(d-C), which is 17.9 and 21.1; (n-1)C/(C-1), (n-1)/2, sqrt(2) and 1-1/C, up to the draw."""
    d = 512
    features = torch.randn(number * n, d, generator=generator())
    weight, labels = torch.randn(number, d, generator=generator(3)), torch.arange(number).repeat(n)
    found = measured(features, labels, number, weight)
    assert found["nc1"] == pytest.approx((n - 1) * (number - 1) / (d - number), rel=0.03)
    assert found["nc1_trace"] == pytest.approx((n - 1) * number / (number - 1), rel=0.03)
    assert found["cdnv"] == pytest.approx((n - 1) / 2, rel=0.03)
    assert found["nc3"] == pytest.approx(2**0.5, abs=0.05)
    metric = ClassMoments(number, d)
    metric.update(features, labels)
    nearest = NearestCentreAgreement(metric.compute().means)
    nearest.update(features, torch.randn(len(features), number, generator=generator(4)))
    assert float(nearest.compute()) == pytest.approx(1 - 1 / number, abs=0.01)


def test_an_orthogonal_frame_is_told_from_a_simplex() -> None:
    frame = torch.linalg.qr(torch.randn(32, 10, generator=generator(), dtype=torch.float64))[0].T
    found = measured(*around(frame, 3, sigma=0), 10)
    assert found["nc2_of"] == pytest.approx(0, abs=1e-12) and found["nc2_etf"] == pytest.approx(0, abs=1e-12)
    shifted = measured(*around(simplex(10, 32), 3, sigma=0), 10)
    assert shifted["nc2_of"] == pytest.approx(0.320, abs=5e-4)


SIZES = torch.tensor([40, 40, 20, 20, 10, 10, 4, 2])


def test_imbalanced_classes_end_in_the_general_orthogonal_frame() -> None:
    """The minimum of the unconstrained features model, found by L-BFGS, has the norms of the formula."""
    labels = torch.repeat_interleave(torch.arange(8), SIZES)
    targets = torch.nn.functional.one_hot(labels, 8).double().T
    weight, features = (
        (torch.randn(8, 16, generator=generator(1), dtype=torch.float64) * 0.5).requires_grad_(),
        (torch.randn(16, len(labels), generator=generator(2), dtype=torch.float64) * 0.5).requires_grad_(),
    )
    optimizer = torch.optim.LBFGS(
        [weight, features], max_iter=3000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight @ features - targets).square().sum() / len(labels) / 2
        loss = loss + 1e-3 * (weight.square().sum() + features.square().sum()) / 2
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    squares = orthogonal_frame_norms(SIZES.double(), 1e-3, 1e-3)[0]
    expected = [6.17856, 6.17856, 4.32614, 4.32614, 3.01628, 3.01628, 1.85400, 1.26821]
    assert squares.tolist() == pytest.approx(expected, abs=1e-5)
    found = measured(features.detach().T, labels, 8, weight, decays=(1e-3, 1e-3))
    assert found["nc2_gof"] < 1e-5 and found["nc2_weight_gof"] < 1e-5
    assert found["nc2_of"] > 0.1 and found["nc2_etf"] > 0.1
    assert measured(features.detach().T, labels, 8, weight, decays=(1e-3, 1e-4))["nc2_gof"] > 0.01


def test_a_rare_class_vanishes_from_the_orthogonal_frame() -> None:
    squares, means = orthogonal_frame_norms(torch.tensor([100.0, 1.0]), 1e-2, 1e-2)
    assert squares[1] == means[1] == 0 < means[0]


def test_unequal_classes_do_not_bend_the_simplex() -> None:
    means = simplex(10, 64) + 1
    labels = torch.repeat_interleave(torch.arange(10), torch.arange(1, 11) * 10)
    found = measured(means[labels], labels, 10)
    assert max(found[name] for name in AT_COLLAPSE if name in found) < 1e-12


# -------------------------------------------------------------------------------------------- definitions and streams


@pytest.mark.parametrize(("num_classes", "num_features"), [(5, 40), (12, 12), (30, 7), (9, 300), (2, 1), (3, 1)])
def test_the_measures_are_those_of_the_definitions(num_classes: int, num_features: int) -> None:
    """Both sides, K <= d and K > d, and more features than one block."""
    features, labels, *classifier = random_problem(num_classes, num_features)
    found, expected = measured(features, labels, num_classes, *classifier), naive(features, labels, *classifier)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-14), name


def test_seven_uneven_batches_are_one() -> None:
    features, labels, *classifier = random_problem(12, 50)
    metric = NeuralCollapse(12, 50)
    for part in torch.arange(len(labels)).split([1, 0, 40, 300, 7, 64, len(labels) - 412]):
        metric.update(features[part], labels[part])
    expected = naive(features, labels, *classifier)
    for name, value in metric.compute(*classifier).items():
        assert float(value) == pytest.approx(expected[name], rel=1e-10), name


def test_states_merge_and_reset() -> None:
    features, labels, *classifier = random_problem(6, 20)
    parts = [NeuralCollapse(6, 20) for _ in range(3)]
    for number, part in enumerate(parts):  # of disjoint classes
        part.update(features[labels % 3 == number], labels[labels % 3 == number])
    parts[0].merge_state(parts[1])
    parts[0].merge_state(parts[2].metric_state)
    expected = naive(features, labels, *classifier)
    for name, value in parts[0].compute(*classifier).items():
        assert float(value) == pytest.approx(expected[name], rel=1e-10), name
    parts[0].reset()
    assert parts[0].missing == list(range(6)) and not parts[0].products.any()


def test_memory_does_not_grow_with_samples() -> None:
    metric = NeuralCollapse(30, 50)
    for seed in range(5):
        metric.update(torch.randn(200, 50, generator=generator(seed)), torch.arange(200) % 30)
    held = [value for value in vars(metric).values() if isinstance(value, Tensor)]
    held += [metric.counts, metric.sums, metric.products, metric.squares]
    unique = {value.data_ptr(): value.untyped_storage().nbytes() for value in held}
    assert sum(unique.values()) == 8 * (30 * (50 + 2) + 50**2)


def test_the_value_of_one_batch_by_forward() -> None:
    features, labels, *_ = random_problem(6, 20)
    metric = NeuralCollapse(6, 20)
    first = metric(features[:300], labels[:300])
    metric(features[300:], labels[300:])
    assert float(first["nc1"]) == pytest.approx(naive(features[:300], labels[:300])["nc1"], rel=1e-10)
    assert float(metric.compute()["nc1"]) == pytest.approx(naive(features, labels)["nc1"], rel=1e-10)


def test_another_classifier_is_measured_anew() -> None:
    features, labels, weight, _ = random_problem(6, 20)
    metric = NeuralCollapse(6, 20)
    metric.update(features, labels)
    assert metric.compute(weight)["nc3"] != metric.compute(weight + 1)["nc3"]
    assert "nc3" not in metric.compute() and "bias_residual" not in metric.compute(weight)


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("sigma", "digits"), [(1e-1, 1e-10), (1e-2, 1e-8), (1e-3, 1e-6)])
def test_narrow_classes_in_float32_features(sigma: float, digits: float) -> None:
    """At sigma = 1e-3 NC1 is 9e-7, which sums in float32 would miss by a factor."""
    features, labels = around(simplex(10, 128, norm=3.0) + 2, 500, sigma)
    features = features.float()
    found = measured(features, labels, 10)["nc1"]
    assert found == pytest.approx(sigma**2 * 81 / 90, rel=0.05)
    assert found == pytest.approx(naive(features, labels)["nc1"], rel=digits)
    # A float32 pseudo-inverse, for comparison, is off by more than the bound of 1e-3 that is promised.
    assert found == pytest.approx(naive(around(simplex(10, 128, norm=3.0) + 2, 500, sigma)[0], labels)["nc1"], rel=1e-3)


def test_the_sums_stay_in_float64() -> None:
    module = torch.nn.ModuleDict({"metric": NeuralCollapse(4, 6), "layer": torch.nn.Linear(6, 4)})
    nearest = NearestCentreAgreement(torch.randn(4, 6))
    module["nearest"] = nearest
    features, labels, *_ = random_problem(4, 6)
    module["metric"].update(features, labels)
    before = module["metric"].compute()
    for convert in (lambda: module.to(torch.bfloat16), module.half, module.bfloat16, module.float):
        convert()
        assert module["layer"].weight.dtype != torch.float64
        assert module["metric"].sums.dtype == module["metric"].products.dtype == torch.float64
        assert nearest.means.dtype == torch.float64 and nearest.total.dtype == torch.int64
        assert module["metric"].compute() == before
    module["metric"].reset()
    assert module["metric"].sums.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_any_float_type(dtype: torch.dtype) -> None:
    features, labels, *_ = random_problem(5, 12)
    features = features.to(dtype)
    assert measured(features, labels.int(), 5)["nc1"] == pytest.approx(naive(features, labels)["nc1"], rel=1e-9)


def test_features_may_require_gradients() -> None:
    features, labels, weight, bias = random_problem(5, 12)
    metric = NeuralCollapse(5, 12)
    metric.update(features.requires_grad_(), labels)
    assert not any(value.requires_grad for value in metric.compute(weight.requires_grad_(), bias).values())


# ----------------------------------------------------------------------------------------- missing classes, NC4, rank


def test_classes_without_samples_are_left_out() -> None:
    features, labels, weight, bias = random_problem(5, 12)
    renumbered = torch.tensor([1, 4, 5, 6, 9])[labels]
    wide, offsets = torch.randn(11, 12, dtype=torch.float64), torch.randn(11, dtype=torch.float64)
    wide[[1, 4, 5, 6, 9]], offsets[[1, 4, 5, 6, 9]] = weight, bias
    metric = NeuralCollapse(11, 12)
    metric.update(features, renumbered)
    assert metric.missing == [0, 2, 3, 7, 8, 10]
    expected = naive(features, labels, weight, bias)
    for name, value in metric.compute(wide, offsets).items():
        assert float(value) == pytest.approx(expected[name], rel=1e-10), name
    moments = metric.moments()
    nearest = NearestCentreAgreement(moments.means, moments.classes)
    scores = -torch.cdist(features, torch.randn(11, 12, dtype=torch.float64))
    scores[:, [1, 4, 5, 6, 9]] = -torch.cdist(features, moments.means)
    scores[:, 7] = 1e9  # of a class that is not there
    nearest.update(features, scores)
    assert nearest.compute() == 0


def test_a_class_of_one_sample_has_no_width() -> None:
    features, labels, *_ = random_problem(5, 12)
    one = torch.cat([features[labels != 3], features[labels == 3][:1]])
    numbers = torch.cat([labels[labels != 3], torch.tensor([3])])
    metric = ClassMoments(5, 12)
    metric.update(one, numbers)
    assert metric.compute().class_scatter[3] == pytest.approx(0, abs=1e-12)
    assert measured(one, numbers, 5)["nc1"] == pytest.approx(naive(one, numbers)["nc1"], rel=1e-10)


def test_nearest_centres_by_hand_and_far_from_the_origin() -> None:
    means = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    features = torch.tensor([[0.4, 0.1], [1.2, 0.3], [0.2, 1.9], [0.1, 2.2]], dtype=torch.float64)
    chosen = torch.tensor([0, 1, 2, 2])  # the third is nearer to class 0
    for offset in (0.0, 1e8):
        nearest = NearestCentreAgreement(means + offset)
        for part in ([0, 1, 2], [3]):
            nearest.update(features[part] + offset, torch.nn.functional.one_hot(chosen[part], 3).float())
        assert nearest.compute() == 0.25


def test_lost_directions_raise_nc1_but_hardly_the_rest() -> None:
    means = simplex(10, 64, norm=3.0)
    left, spectrum, right = torch.linalg.svd(means, full_matrices=False)
    squeezed = left @ (spectrum * torch.tensor([1.0] * 5 + [0.1] * 4 + [0.0])).diag() @ right
    full = measured(*around(means, 200, 0.1), 10)
    flat = measured(*around(squeezed, 200, 0.1), 10)
    assert flat["nc1"] > 20 * full["nc1"] and flat["nc1_trace"] < 2.2 * full["nc1_trace"]
    assert flat["effective_rank"] < 5.5 < 8.9 < full["effective_rank"]


def test_equal_means_have_no_collapse_to_speak_of() -> None:
    features, labels = around(torch.zeros(3, 4), 1, sigma=0)
    found = measured(features + 1, labels, 3)
    assert not np.isfinite(found["nc1"]) and not np.isfinite(found["cdnv"])


def test_features_that_are_not_finite_give_nan() -> None:
    features, labels, *classifier = random_problem(5, 12)
    features[3, 4] = float("nan")
    found = measured(features, labels, 5, *classifier)
    assert all(np.isnan(found[name]) for name in found if "weight" not in name)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3).long(), r"features have shape \[3, 5\], but must be \[batch, 4\]"),
        (torch.zeros(3, 4, 2, 2), torch.zeros(3).long(), r"features have shape \[3, 4, 2, 2\]"),
        (torch.zeros(3, 4).int(), torch.zeros(3).long(), "features are torch.int32"),
        (torch.zeros(3, 4), torch.zeros(2).long(), r"labels have shape \[2\], but 3 features need \[3\]"),
        (torch.zeros(3, 4), torch.zeros(3, 6).long(), r"labels have shape \[3, 6\]"),
        (torch.zeros(3, 4), torch.zeros(3), "labels are torch.float32, but must be integers"),
        (torch.zeros(3, 4), torch.tensor([0, -1, 2]), "labels lie in -1 .. 2, but num_classes=6 allows 0 .. 5"),
        (torch.zeros(3, 4), torch.tensor([0, 1, 6]), r"labels lie in 0 .. 6, .* raise num_classes"),
    ],
)
def test_a_batch_is_refused_and_leaves_nothing_behind(features: Tensor, labels: Tensor, message: str) -> None:
    metric = NeuralCollapse(6, 4)
    with pytest.raises(ValueError, match=message):
        metric.update(features, labels)
    assert not metric.counts.any()


def test_sizes_classifiers_and_too_few_classes() -> None:
    metric = NeuralCollapse(3, 4)
    metric.update(torch.randn(5, 4), torch.full((5,), 2))
    with pytest.raises(ValueError, match="5 samples of 1 of 3 classes have been seen"):
        metric.compute()
    metric.update(torch.randn(5, 4), torch.full((5,), 1))
    with pytest.raises(ValueError, match=r"weight has shape \[4, 3\], but must be \[3, 4\]"):
        metric.compute(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"bias has shape \[4\], but must be \[3\]"):
        metric.compute(torch.zeros(3, 4), torch.zeros(4))


def test_bad_input_of_the_nearest_centres() -> None:
    with pytest.raises(ValueError, match=r"means have shape \[4\] and classes \[4\]"):
        NearestCentreAgreement(torch.zeros(4))
    nearest = NearestCentreAgreement(torch.zeros(2, 4), torch.tensor([0, 3]))
    with pytest.raises(
        ValueError, match=r"logits have shape \[5, 3\], but 5 features and class 3 need \[5, 4 or more\]"
    ):
        nearest.update(torch.zeros(5, 4), torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"features have shape \[5, 3\]"):
        nearest.update(torch.zeros(5, 3), torch.zeros(5, 4))
    with pytest.raises(ValueError, match="no sample has been seen"):
        nearest.compute()
