import pytest
import torch

from distmuon.numerics.coefficients import TABLES, default_restarts, resolve_stages, with_safety


def evaluate(stages, sigma):
    """The scalar polynomial that the iteration applies to singular values, from the definition."""
    for stage in stages:
        r = sigma * sigma
        if len(stage) == 2:
            p = stage[0] + stage[1] * r
        elif len(stage) == 3:
            p = stage[0] + stage[1] * r + stage[2] * r**2
        else:
            const, u, c, d, e = stage
            m = r**2 + u * r
            p = const + d * m + c * m**2 + e * r
        sigma = sigma * p
    return sigma


# Range on [1e-3, 1] and slope at zero, evaluated in float64
RANGES = {
    "quintic": (0.470, 1.203, 485),
    "quintic5": (0.474, 1.146, 493),
    "polar_express": (0.9999, 1.0001, 6363),
    "cans": (0.856, 1.114, 998),
    "cubic": (0.118, 1.302, 119.3),
    "nested14": (0.735, 1.138, 809.3),
    "nested13": (0.474, 1.158, 491.1),
}


@pytest.mark.parametrize("name", TABLES)
def test_range_and_gain(name):
    low, high, gain = RANGES[name]
    stages = resolve_stages(name)
    sigma = torch.logspace(-3, 0, 20001, dtype=torch.float64)
    image = evaluate(stages, sigma)
    assert image.min() >= low
    assert image.max() <= high
    slope = evaluate(stages, torch.tensor(1e-9, dtype=torch.float64)) / 1e-9
    assert slope.item() == pytest.approx(gain, rel=2e-3)


def test_polar_express_with_five_steps_is_the_published_one():
    image = evaluate(resolve_stages("polar_express", 5), torch.logspace(-3, 0, 20001, dtype=torch.float64))
    assert image.min() >= 0.843
    assert image.max() <= 1.126


@pytest.mark.parametrize("name", TABLES)
def test_safety_divides_the_argument(name):
    stages, sigma = resolve_stages(name), torch.logspace(-3, 0, 101, dtype=torch.float64)
    for stage in stages:
        torch.testing.assert_close(evaluate(with_safety([stage], 1.05), sigma), evaluate([stage], sigma / 1.05))


def test_restarts():
    assert default_restarts(5, torch.bfloat16) == default_restarts(5, torch.float16) == (0, 1, 2, 3, 4)
    assert default_restarts(5, torch.float32) == (0,)


def test_every_table_names_its_source():
    assert all(len(table.source) > 20 for table in TABLES.values())


def test_steps_act():
    assert len(resolve_stages("quintic", 7)) == 7
    assert len(resolve_stages((3.0, -3.0, 1.0), 2)) == 2
    assert resolve_stages("polar_express", 12)[-1] == (1.875, -1.25, 0.375)
    assert resolve_stages("polar_express", 3) == resolve_stages("polar_express", 5)[:3]
    assert resolve_stages([(2.0, -1.0), (1.5, -0.5)], 2) == ((2.0, -1.0), (1.5, -0.5))


@pytest.mark.parametrize(
    ("coefficients", "steps", "message"),
    [
        ("keller", 5, "unknown; known: quintic"),
        ("nested14", 5, "pass ns_steps=4"),
        ("cans", 3, "pass ns_steps=5"),
        ("quintic", 0, "whole number from 1 to 99"),
        ("quintic", 100, "whole number from 1 to 99"),
        ("quintic", 2.0, "whole number"),
        ((1.0, 2.0, 3.0, 4.0), 5, "2, 3 or 5 finite numbers"),
        ((1.0, float("nan"), 3.0), 5, "2, 3 or 5 finite numbers"),
        ([(1.5, -0.5)], 3, "pass ns_steps=1"),
        ([], 5, "empty"),
    ],
)
def test_what_cannot_be_run_is_an_error(coefficients, steps, message):
    with pytest.raises(ValueError, match=message):
        resolve_stages(coefficients, steps)
