"""Consistency distillation against a teacher that is known exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ldm_deploy.diffusion.samplers import SamplerRun, ddim_step, lcm_step, predicted_original
from ldm_deploy.diffusion.schedule import Schedule
from ldm_deploy.training.consistency import Levels, consistency_loss, guided, pseudo_huber, solver_grid
from tests.training.gaussian import exact_solution, exact_student, teacher

SCHEDULE = Schedule()
COUNT = 32


def levels() -> Levels:
    """In float64, so that what is left is the solver's error."""
    tables = Levels.of(SCHEDULE)
    return Levels(*(getattr(tables, name).double() for name in ("signal", "spread", "c_skip", "c_out")), tables.kind)


def noised(at: Levels, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    latent = 0.7 + 0.6 * torch.randn(len(timestep), 2, 4, 4, dtype=torch.float64)
    noise = torch.randn_like(latent)
    return latent, noise, at.noised(latent, noise, timestep)


def test_the_tables_are_the_samplers():
    at, prediction = Levels.of(SCHEDULE), torch.full((1, 1, 1, 1), 0.3)
    sample = torch.full((1, 1, 1, 1), 0.8)
    for step, following in ((999, 749), (499, 249), (24, 0)):
        a_t, a_next = (1.0 if t == 0 else float(SCHEDULE.alphas_cumprod[t]) for t in (step, following))
        now, then = torch.tensor([step]), torch.tensor([following])
        numbers = np.float64(0.8), np.float64(0.3)
        assert at.original(sample, prediction, now).item() == pytest.approx(
            predicted_original(*numbers, a_t, "v_prediction"), abs=1e-6
        )
        assert at.ddim_step(sample, prediction, now, then).item() == pytest.approx(
            ddim_step(*numbers, a_t, a_next, "v_prediction"), abs=1e-6
        )
        last = lcm_step(numbers[0], predicted_original(*numbers, a_t, "v_prediction"), step, 1.0, np.zeros(()))
        assert at.consistent(sample, prediction, now).item() == pytest.approx(float(last), abs=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_every_kind_of_prediction_gives_the_same_step(kind):
    at = Levels.of(Schedule(prediction_type=kind, rescale_zero_terminal_snr=False))
    latent, noise, now, then = torch.tensor(0.4), torch.tensor(-1.1), torch.tensor([600]), torch.tensor([500])
    signal, spread = at.at(now)
    prediction = {"epsilon": noise + 0 * signal, "sample": latent + 0 * signal}.get(
        kind, signal * noise - spread * latent
    )
    sample = at.noised(latent, noise, now)
    torch.testing.assert_close(at.original(sample, prediction, now), latent.expand(1, 1, 1, 1))
    torch.testing.assert_close(at.ddim_step(sample, prediction, now, then), at.noised(latent, noise, then))


def test_the_boundary_holds_whatever_the_network_says():
    at, zero = Levels.of(SCHEDULE), torch.zeros(3, dtype=torch.int64)
    sample = torch.randn(3, 2, 4, 4)
    assert torch.equal(at.consistent(sample, 1e3 * torch.randn_like(sample), zero), sample)


@pytest.mark.parametrize("steps", [8, 40, 48, 200])
def test_the_grid_has_every_timestep_that_fewer_steps_visit(steps):
    grid = solver_grid(SCHEDULE, steps)
    assert grid[0] == 999
    assert grid[-1] == 0
    assert (np.diff(grid) < 0).all()
    for count in (1, 2, 4, 8):
        assert set(SCHEDULE.timesteps(count)) <= set(grid)


def test_the_solver_converges_to_the_exact_ode_as_the_skip_shrinks():
    at = levels()
    now, then = torch.full((COUNT,), 800), torch.full((COUNT,), 400)
    _, _, start = noised(at, now)
    exact = exact_solution(at, start, now, then)
    errors = []
    for parts in (1, 2, 4, 8, 16):
        sample, grid = start, torch.linspace(800, 400, parts + 1).long()
        for here, there in itertools.pairwise(grid):
            here, there = here.expand(COUNT), there.expand(COUNT)
            sample = at.ddim_step(sample, teacher(at)(sample, here), here, there)
        errors.append((sample - exact).abs().max().item())
    ratios = [before / after for before, after in itertools.pairwise(errors[1:])]
    assert all(1.7 < ratio < 2.4 for ratio in ratios), errors  # a first-order method


def link_loss(steps: int, wrong: float = 0.0) -> float:
    """The loss of the exact function on every link of a grid; both sides are `wrong` where there is a network."""
    at, grid = levels(), torch.from_numpy(solver_grid(SCHEDULE, steps))
    now, then = grid[:-1].repeat_interleave(8), grid[1:].repeat_interleave(8)
    latent, noise, _ = noised(at, now)
    student = exact_student(at, wrong)
    return consistency_loss(student, student, teacher(at), latent, noise, now, then, at, 0.0).mean().item()


def test_the_exact_function_has_no_loss_but_the_solvers():
    losses = [link_loss(steps) for steps in (20, 40, 80, 160)]
    assert losses[1] < 0.01
    # The error of one step is of second order: half the skip, a quarter of it.
    assert all(3 < before / after < 5 for before, after in itertools.pairwise(losses)), losses


def test_a_wrong_function_has_a_loss_where_it_meets_the_boundary():
    """A constant error agrees with itself along the way; it shows at the last link, whose far end is given: 1 in 40."""
    assert link_loss(40, wrong=0.5) == pytest.approx(0.5 / 40, rel=0.3)
    assert link_loss(40, wrong=0.5) > 3 * link_loss(40)


def test_training_finds_the_exact_function():
    """A student with one free number per timestep and term, from nothing, with the loss and the slow target as used."""
    at, grid = levels(), torch.from_numpy(solver_grid(SCHEDULE, 8))
    own = torch.zeros(3, len(SCHEDULE.alphas_cumprod), dtype=torch.float64, requires_grad=True)
    slow = own.detach().clone()
    optimizer = torch.optim.Adam([own], lr=0.02)

    def network(numbers):
        def predict(sample, timestep):
            scale, shift, _ = (row[timestep][:, None, None, None] for row in numbers)
            return scale * sample + shift

        return predict

    numbers = torch.Generator().manual_seed(0)
    for step in range(1500):
        place = torch.randint(8, (64,), generator=numbers)
        latent = 0.7 + 0.6 * torch.randn(64, 1, 4, 4, generator=numbers, dtype=torch.float64)
        noise = torch.randn(64, 1, 4, 4, generator=numbers, dtype=torch.float64)
        loss = consistency_loss(
            network(own), network(slow), teacher(at), latent, noise, grid[place], grid[place + 1], at, 1e-3
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
        optimizer.step()
        slow.lerp_(own.detach(), 0.05)
    # What the solver reaches in eight steps from pure noise, drawn by the student in one.
    torch.manual_seed(1)
    start = torch.randn(COUNT, 1, 4, 4, dtype=torch.float64)
    sample = start
    for now, then in itertools.pairwise(grid):
        now, then = now.expand(COUNT), then.expand(COUNT)
        sample = at.ddim_step(sample, teacher(at)(sample, now), now, then)
    first = torch.full((COUNT,), 999)
    drawn = at.consistent(start, network(own.detach())(start, first), first)
    assert (drawn - sample).abs().max() < 0.05
    assert (drawn - sample).abs().max() < 0.1 * (drawn - start).abs().max()


def test_the_loss_is_a_square_near_and_a_distance_far():
    one, other = torch.zeros(1, 1, 2, 2), torch.tensor([[[[3.0, 4.0], [0.0, 0.0]]]])
    assert pseudo_huber(one, other, 0.0).item() == pytest.approx(2.5)  # root of the mean of 9, 16, 0, 0
    assert pseudo_huber(one, 1e-3 * other, 1.0).item() == pytest.approx(0.5 * 2.5e-3**2, rel=0.1)
    assert pseudo_huber(one, one, 0.5).item() == 0


def test_no_gradient_reaches_target_or_teacher():
    at = Levels.of(SCHEDULE)
    weights = [torch.ones(1, requires_grad=True) for _ in range(3)]
    networks = [lambda sample, timestep, weight=weight: weight * sample for weight in weights]
    now, then = torch.tensor([499]), torch.tensor([474])
    loss = consistency_loss(*networks, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), now, then, at, 1e-3)
    loss.sum().backward()
    assert weights[0].grad is not None
    assert weights[1].grad is None
    assert weights[2].grad is None


def test_guidance_is_that_of_the_pipeline_for_each_image():
    conditional, unconditional = torch.tensor([[[[2.0]]], [[[2.0]]]]), torch.ones(2, 1, 1, 1)
    assert guided(conditional, unconditional, torch.tensor([1.0, 5.0])).flatten().tolist() == [2.0, 6.0]


def test_the_sampler_draws_with_the_exact_function_what_the_data_is_like():
    """Four steps of multistep sampling keep mean and deviation of the data, where each step is exact."""
    at = levels()
    draws = np.random.default_rng(0)
    run = SamplerRun("lcm", SCHEDULE, 4, lambda index: draws.standard_normal((4000, 1, 1, 1)))
    sample = draws.standard_normal((4000, 1, 1, 1))
    for index, (timestep, _, _) in enumerate(run.levels):
        given = torch.from_numpy(sample)
        sample = run.step(index, sample, exact_student(at)(given, torch.full((4000,), timestep)).numpy())
    assert sample.mean() == pytest.approx(0.7, abs=0.05)
    assert sample.std() == pytest.approx(0.6, abs=0.05)
