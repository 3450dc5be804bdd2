"""The losses and the head of face training, beside torch's own softmax, InsightFace's numbers, and other processes."""

import math

import numpy as np
import pytest
import torch
from torch import multiprocessing
from torch.nn import functional as F

from calib_nb.training.margins import GRADIENTS, MARGINS, CombinedMargin, angle, margin_of
from calib_nb.training.partial_fc import PartialFC, class_numbers, class_part, first_weights

CLASSES, DIMS, BATCH, STEPS = 1001, 8, 12, 20


def head_steps(rate: float, kind: str, rank: int = 0, world: int = 1) -> tuple[list[float], torch.Tensor]:
    """Losses and class weights of 20 steps, in which a small network and the head learn by SGD."""
    torch.manual_seed(0)
    network = torch.nn.Linear(6, DIMS)
    model = torch.nn.parallel.DistributedDataParallel(network) if world > 1 else network
    head = PartialFC(CLASSES, DIMS, margin_of(kind), rate=rate, seed=3, group=world > 1)
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], 0.002, 0.9, weight_decay=5e-4)
    random, losses = torch.Generator().manual_seed(1), []
    for step in range(STEPS):
        x = torch.randn(BATCH, 6, generator=random)
        labels = torch.randint(CLASSES, (BATCH,), generator=random)
        own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        head.begin_step(step, labels)
        optimizer.zero_grad()
        loss = head(10 * model(x[own]), labels[own])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, torch.cat([head.weight.detach().flatten(), network.weight.detach().flatten()])


def one_rank(rank: int, world: int, cases: list, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    torch.save([head_steps(*case, rank, world) for case in cases], f"{folder}/{world}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_one_two_and_three_processes_learn_the_same(tmp_path, one_thread):
    cases = [(1.0, "adaface"), (0.3, "magface")]
    alone = [head_steps(*case) for case in cases]
    assert all(np.isfinite(losses).all() and losses[0] != losses[-1] for losses, _ in alone)
    for world in (2, 3):
        multiprocessing.start_processes(one_rank, (world, cases, str(tmp_path)), world, start_method="fork")
        ranks = [torch.load(tmp_path / f"{world}-{rank}.pt") for rank in range(world)]
        for k, (losses, weights) in enumerate(alone):
            for rank in ranks:
                np.testing.assert_allclose(rank[k][0], losses, rtol=1e-5, atol=1e-5)
            head = torch.cat([rank[k][1][: -6 * DIMS] for rank in ranks])
            both = torch.cat([head, ranks[0][k][1][-6 * DIMS :]])
            assert (both - weights).abs().max() <= 1e-5 * weights.abs().max()


def test_all_classes_are_a_plain_softmax_and_a_share_is_one_over_what_is_drawn():
    x = torch.randn(9, DIMS, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, 5, 1000, 999, 17, 200, 31, 4])
    for rate in (1.0, 0.05):
        head = PartialFC(CLASSES, DIMS, margin_of("cosface"), rate=rate, seed=1).double()
        head.begin_step(7, labels)
        assert set(labels.tolist()) <= set(head.columns.tolist())
        weights = F.normalize(head.weight[head.columns])
        places = torch.tensor([head.columns.tolist().index(k) for k in labels.tolist()])
        cosine = F.normalize(x) @ weights.T - 0.4 * F.one_hot(places, len(head.columns)).double()
        wanted, loss = F.cross_entropy(64 * cosine, places), head(x, labels)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)
        for mine, theirs in zip(
            torch.autograd.grad(loss, (x, head.weight)), torch.autograd.grad(wanted, (x, head.weight))
        ):
            assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-9)


def test_draws_depend_on_seed_step_and_class_alone():
    every = torch.arange(CLASSES)
    numbers = class_numbers(5, 2, every)
    assert torch.equal(class_numbers(5, 2, every.flip(0)).flip(0), numbers)
    for other in ((5, 3), (6, 2)):
        assert (class_numbers(*other, every) - numbers).abs().mean() > 0.25  # 1/3 for numbers that are independent
    drawn = torch.stack([class_numbers(0, step, every) < 0.3 for step in range(200)]).double()
    assert abs(drawn.mean() - 0.3) < 0.005 and drawn.mean(dim=0).min() > 0.1 and drawn.mean(dim=0).max() < 0.5
    for world in (1, 2, 3, 7):
        parts = [class_part(CLASSES, rank, world) for rank in range(world)]
        assert [k for part in parts for k in part] == list(range(CLASSES))
        assert torch.equal(torch.cat([first_weights(p, 4, 9) for p in parts]), first_weights(range(CLASSES), 4, 9))


def insightface_arcface(cosine: np.ndarray, labels: np.ndarray, m: float = 0.5, s: float = 64) -> tuple:
    """Logits and slopes as InsightFace's published formula gives them: the margin is set outside of the graph."""
    logits = cosine.copy()
    rows = np.arange(len(labels))
    logits[rows, labels] = np.cos(np.arccos(cosine[rows, labels]) + m)
    return logits * s, np.full_like(cosine, s)


def test_straight_through_gives_insightface_s_numbers_and_exact_the_true_slope():
    random = np.random.default_rng(0)
    cosine, labels = random.uniform(-0.99, 0.99, (50, 7)), random.integers(0, 7, 50)
    logits, slopes = insightface_arcface(cosine, labels)
    for gradient in GRADIENTS:
        x = torch.tensor(cosine, requires_grad=True)
        mine = margin_of("arcface", gradient=gradient)(x, torch.tensor(labels), torch.ones(50))
        np.testing.assert_allclose(mine.detach(), logits, atol=1e-10)
        mine.sum().backward()
        theta = np.arccos(cosine[range(50), labels])
        true = 64 * np.sin(theta + 0.5) / np.sin(theta)
        wanted = slopes.copy()
        if gradient == "exact":
            wanted[range(50), labels] = true
        np.testing.assert_allclose(x.grad, wanted, rtol=1e-9)


@pytest.mark.parametrize("kind", MARGINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_margin_is_infinite_anywhere(kind, dtype):
    ends = torch.tensor([-1.0, -1 + 1e-7, 0.0, 1 - 1e-7, 1.0, 1 + 1e-6], dtype=dtype)
    for gradient in GRADIENTS:
        cosine = ends[:, None].repeat(1, 2).requires_grad_()
        norms = torch.tensor([0.0, 1e-6, 1.0, 50.0, 1e4, 3.0])
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            margin = margin_of(kind, gradient=gradient)
            margin.begin(norms)
            logits = margin(cosine, torch.zeros(6, dtype=torch.int64), norms)
            (F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64)) + margin.regulariser(norms)).backward()
        assert logits.dtype == torch.float32 and torch.isfinite(logits).all() and torch.isfinite(cosine.grad).all()


def test_the_angle_keeps_a_slope_at_its_ends():
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float32, requires_grad=True)
    angle(ends).sum().backward()
    assert (ends.grad < -1e3).all() and angle(ends)[0].item() == pytest.approx(math.pi, abs=1e-3)
    assert CombinedMargin(m2=0.5)(ends[None], torch.tensor([1]), torch.ones(1))[0, 1].item() == pytest.approx(
        64 * math.cos(0.5), abs=0.05
    )
