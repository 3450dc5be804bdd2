"""The tagger's network against what is published, its losses, metrics and checkpoints."""

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib_nb.core.errors import ModelError
from calib_nb.nets.checkpoint import load_imagenet
from calib_nb.nets.resnet import LAYOUTS, fold_batchnorm, resnet
from calib_nb.tags.coco import COCO_CATEGORIES
from calib_nb.tags.evaluate import export_tagger, open_tagger
from calib_nb.tags.losses import asymmetric, cross_entropy, focal
from calib_nb.tags.metrics import TAG_AVERAGES, best_threshold, split_rows, tag_rates, threshold_curve
from calib_nb.tags.network import TaggerSpec, build_tagger, load_tagger, save_tagger

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
PUBLISHED = {
    "resnet18": ((2, 2, 2, 2), 2),
    "resnet34": ((3, 4, 6, 3), 2),
    "resnet50": ((3, 4, 6, 3), 3),
}  # blocks per stage, convolutions per block


def published_keys(name: str) -> list[str]:
    """The keys of torchvision's state dict, in its order."""
    depths, convolutions = PUBLISHED[name]
    keys = ["conv1.weight", *(f"bn1.{n}" for n in NORM)]
    for stage, depth in enumerate(depths, 1):
        for block in range(depth):
            at = f"layer{stage}.{block}."
            for c in range(1, convolutions + 1):
                keys += [f"{at}conv{c}.weight", *(f"{at}bn{c}.{n}" for n in NORM)]
            if block == 0 and (stage > 1 or convolutions == 3):
                keys += [f"{at}downsample.0.weight", *(f"{at}downsample.1.{n}" for n in NORM)]
    return [*keys, "fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weights_are_named_and_counted_as_published(name):
    module = resnet(name, 80)
    assert list(module.state_dict()) == published_keys(name)
    assert (
        sum(p.numel() for p in module.parameters())
        == {"resnet18": 11_217_552, "resnet34": 21_325_712, "resnet50": 23_671_952}[name]
    )
    assert list(LAYOUTS) == list(PUBLISHED)
    shapes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    wide = 512 if name != "resnet50" else 2048
    assert shapes["fc.weight"] == (80, wide) and shapes["conv1.weight"] == (64, 3, 7, 7)
    assert shapes["layer2.0.downsample.0.weight"] == ((128, 64, 1, 1) if name != "resnet50" else (512, 256, 1, 1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_folding_changes_nothing_but_the_modules(name):
    torch.manual_seed(1)
    module = resnet(name, 5, width=8)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
                part.weight.uniform_(0.5, 1.5)
        x = torch.randn(2, 3, 64, 64)
        folded = fold_batchnorm(module)
        assert torch.allclose(folded(x), module.eval()(x), rtol=1e-3, atol=1e-3)
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_imagenet_weights_load_and_the_head_stays(tmp_path):
    published = resnet("resnet18", 1000).state_dict()
    torch.save(published, tmp_path / "resnet18.pth")
    module = build_tagger(TaggerSpec("resnet18", tuple(COCO_CATEGORIES.values())))
    head = module.fc.weight.clone()
    assert load_imagenet(module, tmp_path / "resnet18.pth") == ["fc.weight", "fc.bias"]
    assert torch.equal(module.layer4[1].conv2.weight, published["layer4.1.conv2.weight"]) and torch.equal(
        module.fc.weight, head
    )
    assert load_imagenet(resnet("resnet18"), tmp_path / "resnet18.pth") == []  # a head that fits is loaded


class Evil:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_checkpoint_runs_nothing(tmp_path, capsys):
    torch.save({"format": 1, "spec": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="cannot be read"):
        load_tagger(tmp_path / "evil.pth")
    assert "this ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half a zip", b"hello", b"\x80\x02}q\x00."])
def test_a_damaged_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_tagger(tmp_path / "bad.pth")
    assert "\n" not in str(caught.value) and "bad.pth" in str(caught.value)


def test_an_exported_tagger_says_what_it_is(tmp_path):
    spec = TaggerSpec("resnet18", ("a", "b", "c"), width=8, size=40, crop=0.8)
    module = build_tagger(spec)
    tagger = open_tagger(export_tagger(save_tagger(tmp_path / "t.pth", spec, module), tmp_path / "t.onnx"))
    assert tagger.classes == spec.classes and tagger.preprocess == spec.preprocess()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert np.allclose(tagger.session.run(None, {"input": x.numpy()})[0], module.eval()(x), atol=1e-4)


@settings(deadline=None, derandomize=True)
@given(
    hnp.arrays(np.float64, (4, 3), elements=st.floats(-30, 30)),
    hnp.arrays(np.int8, (4, 3), elements=st.integers(0, 1)),
    st.floats(0, 5),
)
def test_the_losses_meet_in_their_limits(logits, targets, gamma):
    x, y = torch.from_numpy(logits), torch.from_numpy(targets).double()
    bce = cross_entropy(x, y)
    assert torch.allclose(bce, torch.nn.functional.binary_cross_entropy_with_logits(x, y))
    assert torch.allclose(focal(x, y, gamma=0), bce) and torch.allclose(
        asymmetric(x, y, gamma_positive=0, gamma_negative=0, margin=0), bce
    )
    assert torch.allclose(
        asymmetric(x, y, gamma_positive=gamma, gamma_negative=gamma, margin=0), focal(x, y, gamma=gamma)
    )
    assert focal(x, y, gamma=gamma) <= bce + 1e-12 and asymmetric(x, y) >= 0


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.bool_, (7, 4)), hnp.arrays(np.int8, (7, 4), elements=st.integers(0, 1)))
def test_rates_are_scikit_learns(said, targets):
    for average in TAG_AVERAGES:
        shown = None if average == "micro" else np.flatnonzero(targets.any(0))
        if shown is not None and not len(shown):
            continue
        wanted = sklearn.metrics.precision_recall_fscore_support(
            targets, said, average=average, labels=shown, zero_division=0
        )[:3]
        assert np.allclose(list(tag_rates(said, targets, average).values()), wanted)


def test_the_threshold_is_the_best_there_is():
    rng = np.random.default_rng(4)
    targets = rng.integers(0, 2, (300, 5))
    probabilities = np.clip(0.3 * targets + rng.random((300, 5)) * 0.6, 0, 1)
    curve = threshold_curve(probabilities, targets)
    wanted = [
        sklearn.metrics.f1_score(targets, probabilities > t, average="micro", zero_division=0) for t in curve.threshold
    ]
    assert np.allclose(curve.f1, wanted) and curve.f1[curve.threshold == best_threshold(curve)].item() == max(wanted)


@settings(deadline=None, derandomize=True)
@given(st.integers(2, 200), st.floats(0.01, 0.99), st.integers(0, 9))
def test_the_two_parts_share_nothing(n, share, seed):
    one, other = split_rows(n, share=share, seed=seed)
    assert len(one) and len(other) and sorted([*one, *other]) == list(range(n))
