"""The transcriptions of the family's papers, against what the papers say of them."""

import math

import pytest
import torch
from family_reference import (
    LMO_NORMS,
    AdaMuon,
    AdamW,
    Muon,
    MuonBP,
    MuonClip,
    NorMuon,
    Scion,
    adam_size,
    cautious,
    jordan_scale,
    lmo_bias,
    lmo_col_norm,
    lmo_row_norm,
    lmo_sign,
    lmo_spectral,
    moonlight_scale,
    polar,
    qk_clip,
    size_of,
    spectral_scale,
    unit_scale,
)

SHAPES = ((6, 6), (4, 10), (10, 4))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(matrix):
    return matrix.square().mean().sqrt().item()


def run(rule, weight, grads):
    for grad in grads:
        weight = rule(weight, grad)
    return weight


def quintic(matrix):
    """Five steps of Jordan's iteration, whose singular values are not 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factor(shape):
    """It is the nearest matrix with orthonormal rows or columns, and leaves a null space alone."""
    matrix = random(*shape)
    factor = polar(matrix)
    short = factor if shape[0] <= shape[1] else factor.T
    assert torch.allclose(short @ short.T, torch.eye(min(shape), dtype=torch.float64), atol=1e-12)
    assert (factor.T @ matrix - matrix.T @ factor).abs().max() < 1e-12  # V S V^T
    low = matrix[:, :1] @ matrix[:1]
    assert polar(low).norm().item() == pytest.approx(1.0)
    assert not polar(torch.zeros(shape)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_moonlight_lemma_1(shape):
    """The root mean square of ``U V^T`` is ``1/sqrt(max(m, n))``, so that scaled updates have 0.2."""
    assert rms(polar(random(*shape))) == pytest.approx(1 / math.sqrt(max(shape)))
    before = random(*shape, seed=1)
    after = Muon(lr=0.5)(before, random(*shape))
    assert rms(after - before) == pytest.approx(0.5 * 0.2)


def test_scales_by_shape():
    assert [jordan_scale(8, 2), jordan_scale(2, 8)] == [2, 1]
    assert [spectral_scale(8, 2), spectral_scale(2, 8)] == [2, 0.5]
    assert [moonlight_scale(16, 4), moonlight_scale(4, 25)] == pytest.approx([0.8, 1])
    assert size_of(moonlight_scale)(3, 11) == pytest.approx(adam_size(3, 11))
    assert size_of(unit_scale)(3, 11) == math.sqrt(3)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sum_and_average_of_gradients_are_one_momentum(nesterov):
    """They differ by ``1 - mu``, which an exact polar factor does not see."""

    class Averaged(Muon):
        def blend(self, grad):
            past = 0.0 if self.sum is None else self.sum
            self.sum = self.mu * past + (1 - self.mu) * grad
            return self.mu * self.sum + (1 - self.mu) * grad if self.nesterov else self.sum

    grads = [random(5, 7, seed=seed) for seed in range(6)]
    keywords = {"lr": 0.1, "weight_decay": 0.1, "nesterov": nesterov}
    summed, averaged = (run(kind(**keywords), random(5, 7, seed=9), grads) for kind in (Muon, Averaged))
    assert torch.allclose(summed, averaged, rtol=0, atol=1e-12)
    other = run(Muon(**{**keywords, "nesterov": not nesterov}), random(5, 7, seed=9), grads)
    assert not torch.allclose(summed, other, atol=1e-3)


def test_decay_takes_the_rate_without_the_scale_and_the_old_weight():
    weight = random(8, 2)
    decayed = Muon(lr=0.1, weight_decay=0.3, scale=jordan_scale)(weight, random(8, 2, seed=1))
    plain = Muon(lr=0.1, scale=jordan_scale)(weight, random(8, 2, seed=1))
    assert torch.allclose(decayed, plain - 0.1 * 0.3 * weight, rtol=0, atol=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_rows_are_of_one_size(shape):
    """In the first step, and where gradients stay the same: each row then is divided by its own size."""
    rule = NorMuon(quintic, lr=1.0, eps=0.0)
    weight = grad = random(*shape)
    for step in range(3):
        update, weight = weight, rule(weight, grad)
        sizes = (update - weight).norm(dim=1)
        assert torch.allclose(sizes, sizes.mean(), rtol=1e-12), step
        assert (update - weight).norm().item() == pytest.approx(0.2 * math.sqrt(shape[0] * shape[1]))
    assert rule.second.shape == (shape[0], 1)  # m numbers beside the m n of momentum
    assert not torch.allclose(quintic(grad).norm(dim=1), quintic(grad).norm(dim=1).mean(), rtol=1e-2)


def test_normuon_is_muon_where_rows_are_of_one_size_already():
    """Section 3.1: with an exact polar factor of a wide matrix of full rank."""
    grads = [random(4, 10, seed=seed) for seed in range(5)]
    keywords = {"lr": 0.1, "weight_decay": 0.1}
    normed = run(NorMuon(eps=0.0, **keywords), random(4, 10, seed=7), grads)
    assert torch.allclose(normed, run(Muon(**keywords), random(4, 10, seed=7), grads), rtol=0, atol=1e-12)
    tall = [grad.T for grad in grads]
    normed = run(NorMuon(eps=0.0, **keywords), random(10, 4, seed=7), tall)
    assert not torch.allclose(normed, run(Muon(**keywords), random(10, 4, seed=7), tall), atol=1e-2)


def test_normuon_remembers_the_size_of_rows():
    """After a step in which a row was large it moves less than others for a while."""
    rule = NorMuon(lambda matrix: matrix, lr=1.0, momentum=0.0, eps=0.0, beta2=0.9)
    rows = torch.ones(2, 3, dtype=torch.float64)
    rule(rows, rows * torch.tensor([[10.0], [1.0]]))
    moved = rows - rule(rows, rows)
    seen = 0.1 * torch.tensor([0.9 * 100 + 1, 0.9 + 1], dtype=torch.float64)
    assert rule.second.flatten().tolist() == pytest.approx(seen.tolist())
    assert (moved[0, 0] / moved[1, 0]).item() == pytest.approx((seen[1] / seen[0]).sqrt().item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", [NorMuon, AdaMuon])
def test_updates_have_the_root_mean_square_of_adamw(rule, shape):
    """Exactly 0.2 lr in every step, whatever Newton-Schulz leaves of the singular values."""
    rule = rule(quintic, lr=0.3)
    weight = random(*shape)
    for seed in range(4):
        before, weight = weight, rule(weight, random(*shape, seed=seed + 1))
        assert rms(weight - before) == pytest.approx(0.3 * 0.2, rel=1e-12)


@pytest.mark.parametrize("rule", [Muon, NorMuon, AdaMuon, MuonClip])
def test_no_gradient_no_update(rule):
    weight = random(3, 5)
    assert torch.equal(rule(lr=0.1, weight_decay=0.0)(weight, torch.zeros(3, 5)), weight)


def test_first_update_of_adamuon_is_a_sign():
    """``O / sqrt(O^2)``, of one size whatever ``O`` is."""
    grad = random(4, 6)
    moved = -AdaMuon(lr=1.0, eps=0.0)(torch.zeros(4, 6), grad)
    assert torch.allclose(moved, 0.2 * polar(torch.sign(grad)).sign(), rtol=0, atol=1e-12)


def test_adamuon_sees_signs_of_momentum_alone():
    grads = [random(4, 6, seed=seed) for seed in range(3)]
    first = run(AdaMuon(lr=0.1, momentum=0.0), random(4, 6, seed=9), grads)
    scaled = run(AdaMuon(lr=0.1, momentum=0.0), random(4, 6, seed=9), [grad * grad.abs() for grad in grads])
    assert torch.allclose(first, scaled, rtol=0, atol=1e-12)
    late = run(AdaMuon(lr=0.1, momentum=0.9), random(4, 6, seed=9), grads)
    assert not torch.allclose(first, late, atol=1e-3)


def test_one_beta_in_adamuon():
    grads = [random(4, 6, seed=seed) for seed in range(4)]
    one = run(AdaMuon(lr=0.1, momentum=0.8), random(4, 6, seed=9), grads)
    assert torch.equal(one, run(AdaMuon(lr=0.1, momentum=0.8, beta2=0.8), random(4, 6, seed=9), grads))
    assert not torch.allclose(one, run(AdaMuon(lr=0.1, momentum=0.8, beta2=0.5), random(4, 6, seed=9), grads))


def test_adamuon_remembers_the_size_of_elements():
    rule = AdaMuon(lambda matrix: matrix * sizes, lr=1.0, momentum=0.0, eps=0.0, beta2=0.9)
    weight = grad = torch.ones(2, 3, dtype=torch.float64)
    sizes = torch.ones(2, 3, dtype=torch.float64)
    sizes[0, 1] = 10
    weight = rule(weight, grad)
    sizes = torch.ones(2, 3, dtype=torch.float64)
    moved = weight - rule(weight, grad)
    assert rule.second[0].tolist() == pytest.approx([0.1 * 1.9, 0.1 * 91, 0.1 * 1.9])
    assert (moved[0, 1] / moved[0, 0]).item() == pytest.approx(math.sqrt(1.9 / 91))


def test_bias_correction_would_cancel():
    """Why neither paper has it: all of ``V`` has one factor, and the size of an update is fixed."""

    class Corrected(AdaMuon):
        time = 0

        def direction(self, blended):
            self.time += 1
            update = super().direction(blended)
            corrected = self.second / (1 - self.beta2**self.time)
            ortho = self.orthogonalize(torch.sign(blended)) / corrected.sqrt()
            assert torch.allclose(update, ortho * (update.norm() / ortho.norm()), rtol=1e-12)
            return update

    run(Corrected(lr=0.1, eps=0.0), random(4, 6), [random(4, 6, seed=seed) for seed in range(4)])


def test_muonbp_lies_between_muon_and_blocks():
    grads = [random(8, 5, seed=seed) for seed in range(6)]
    start = random(8, 5, seed=9)
    keywords = {"lr": 0.1, "weight_decay": 0.1}
    whole = run(Muon(**keywords), start, grads)
    assert torch.equal(run(MuonBP(period=1, blocks=4, **keywords), start, grads), whole)
    assert torch.equal(run(MuonBP(period=3, blocks=1, **keywords), start, grads), whole)
    blocks = run(MuonBP(period=10**9, first=1, blocks=4, **keywords), start, grads)
    halves = [run(Muon(**keywords), start[i : i + 2], [grad[i : i + 2] for grad in grads]) for i in (0, 2, 4, 6)]
    assert torch.allclose(blocks, torch.cat(halves), rtol=0, atol=1e-14)
    assert not torch.allclose(blocks, whole, atol=1e-2)


def test_muonbp_begins_whole_and_repeats():
    rule, weight, kinds = MuonBP(period=3, blocks=2, lr=0.1, block_lr_ratio=0.5), random(6, 4), []
    for seed in range(6):
        grad = random(6, 4, seed=seed + 1)
        before, weight = weight, rule(weight, grad)
        kinds.append(torch.allclose(before - weight, 0.1 * moonlight_scale(6, 4) * polar(rule.sum)))
        if not kinds[-1]:  # blocks have 3 rows of 4
            expected = torch.cat([moonlight_scale(3, 4) * polar(half) for half in rule.sum.chunk(2)])
            assert torch.allclose(before - weight, 0.1 * 0.5 * expected)
    assert kinds == [True, False, False] * 2


def test_cautious_decay_leaves_what_the_step_makes_larger():
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0, 0.0])
    update = torch.tensor([0.5, -0.5, -0.5, 0.5, 0.0, 1.0])
    assert cautious(weight, update).tolist() == [1, 0, -1, 0, 2, 0]


@pytest.mark.parametrize("rule", [Muon, NorMuon, AdaMuon])
def test_cautious_decay_of_a_matrix(rule):
    weight, grad = random(4, 6), random(4, 6, seed=1)
    plain = rule(lr=0.1)(weight, grad)
    moved = rule(lr=0.1, weight_decay=0.5, cautious_wd=True)(weight, grad)
    shrinks = (weight - plain) * weight >= 0
    assert 0 < shrinks.sum() < 24
    assert torch.allclose(moved, plain - 0.05 * weight * shrinks, rtol=0, atol=1e-15)


def test_adamw_is_that_of_torch():
    start, grads = random(5, 3), [random(5, 3, seed=seed) for seed in range(1, 8)]
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([param], lr=0.1, betas=(0.8, 0.9), weight_decay=0.2, foreach=False)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    expected = run(AdamW(lr=0.1, betas=(0.8, 0.9), weight_decay=0.2), start, grads)
    assert torch.allclose(param, expected, rtol=0, atol=1e-12)


def test_cautious_decay_of_adamw():
    start, grads = random(5, 3), [random(5, 3, seed=seed) for seed in range(1, 4)]
    plain, spared = AdamW(lr=0.1), AdamW(lr=0.1, weight_decay=0.2, cautious_wd=True)
    weight = start
    for grad in grads:
        expected = plain(weight, grad)
        smaller = (weight - expected) * weight >= 0
        assert 0 < smaller.sum() < 15
        moved = spared(weight, grad)
        assert torch.allclose(moved, expected - 0.02 * weight * smaller, rtol=0, atol=1e-15)
        weight = moved


@pytest.mark.parametrize("lmo", LMO_NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_oracles_minimize_on_the_ball(lmo, shape):
    """``lmo(s)`` has norm 1, and no other point of the ball has a smaller product with ``s``."""
    given = random(*(shape[:1] if lmo is lmo_bias else shape))
    norm, best = LMO_NORMS[lmo], lmo(given)
    assert norm(best).item() == pytest.approx(1.0)
    assert (norm(-3 * best) / 3).item() == pytest.approx(1.0)
    assert torch.allclose(lmo(7 * given), best)
    for seed in range(200):
        other = random(*given.shape, seed=seed)
        assert (given * other / norm(other)).sum() <= (given * best).sum() + 1e-12
        near = best + 1e-3 * other
        assert (given * near / norm(near)).sum() <= (given * best).sum() + 1e-12


def test_scales_of_oracles():
    """Tables 2 to 4, on a layer of 8 outputs and 2 inputs."""
    given = random(8, 2)
    assert torch.allclose(lmo_spectral(given), 2 * polar(given))
    assert torch.allclose(lmo_spectral(given.T), polar(given.T) / 2)
    assert torch.allclose(lmo_spectral(given.T, first=True), polar(given.T))
    assert lmo_sign(given).abs().unique().tolist() == [0.5]
    assert lmo_sign(given, last=False).abs().unique().tolist() == [1.0]
    assert torch.allclose(lmo_col_norm(given).norm(dim=0), torch.tensor(8.0).double().sqrt())
    assert torch.allclose(lmo_row_norm(given).norm(dim=1), torch.tensor(0.5).double().sqrt())
    assert rms(lmo_bias(given[:, 0])) == pytest.approx(1.0)
    embedding = random(50, 6)  # of 50 tokens: the first layer transposed
    assert torch.allclose(lmo_col_norm(embedding.T).T.square().mean(1), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("lmo", [lmo_col_norm, lmo_row_norm, lmo_bias, lmo_sign])
def test_oracles_of_what_has_no_gradient(lmo):
    given = random(4, 3)
    given[1], given[:, 2] = 0, 0
    given = given[:, 2] if lmo is lmo_bias else given
    assert lmo(given).isfinite().all()
    assert torch.equal(lmo(given) == 0, given == 0)


@pytest.mark.parametrize("lmo", LMO_NORMS)
def test_constrained_scion_stays_in_its_ball(lmo):
    """Insight 3.1: from within the radius it never leaves; unconstrained it goes as far as its steps add up to."""
    shape = (6,) if lmo is lmo_bias else (6, 4)
    norm, push = LMO_NORMS[lmo], random(*shape)
    for constrained in (True, False):
        rule = Scion(lmo, gamma=0.1, radius=3.0, alpha=0.1, constrained=constrained)
        weight = torch.zeros(shape)
        norms = []
        for seed in range(60):
            weight = rule(weight, push + 0.1 * random(*shape, seed=seed))
            norms.append(norm(weight).item())
        assert (max(norms) <= 3.0 + 1e-12) == constrained
        assert norms[-1] > 2.5
        assert max(norms) <= 3.0 * 0.1 * 60 + 1e-12


def test_constrained_scion_is_muon_with_decay():
    """Section 3, and section 4 of Muon: without Nesterov, ``lr = gamma rho``, ``weight_decay = 1/rho``."""
    grads = [random(6, 4, seed=seed) for seed in range(5)]
    start = random(6, 4, seed=9)
    for constrained, decay in ((True, 1 / 3), (False, 0.0)):
        scion = Scion(lmo_spectral, gamma=0.1, radius=3.0, alpha=0.2, constrained=constrained)
        muon = Muon(lr=0.3, weight_decay=decay, momentum=0.8, scale=spectral_scale)
        assert torch.allclose(run(scion, start, grads), run(muon, start, grads), rtol=0, atol=1e-12)


def test_qk_clip_bounds_the_product():
    """Section 2.1: logits of a head are multiplied by ``tau/S`` where they were above, others are left."""
    query, key = random(6, 4), random(6, 4, seed=1)
    logits = torch.tensor([50.0, 200.0, -3.0])
    for alpha in (0.5, 0.2):
        clipped_query, clipped_key = qk_clip(query, key, logits, alpha=alpha)
        for head, gamma in enumerate([1, 0.5, 1]):
            rows = slice(2 * head, 2 * head + 2)
            product = clipped_query[rows] @ clipped_key[rows].T
            assert torch.allclose(product, gamma * query[rows] @ key[rows].T)
        assert torch.allclose(clipped_query[2:4], query[2:4] * 0.5**alpha)
