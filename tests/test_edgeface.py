"""EdgeFace: published sizes, parts by definition, checkpoints, ONNX against torch, hostile files, hub, command."""

import io
import math
import os
import pickle
import runpy
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from calib_nb.cli import main
from calib_nb.core.errors import InputError, ModelError
from calib_nb.data.images import decode
from calib_nb.data.preprocess import preset
from calib_nb.faces.align import align
from calib_nb.faces.detect import detect_opencv
from calib_nb.faces.edgeface import (
    EDGEFACE_OPSETS,
    EDGEFACE_VARIANTS,
    edgeface,
    export_edgeface,
    flops_table,
    load_edgeface,
    read_edgeface,
)
from calib_nb.faces.edgenext import (
    EDGENEXT_SIZES,
    CrossCovarianceAttention,
    LoRaLin,
    SplitTransposeBlock,
    edgenext,
    fourier_positions,
    low_rank,
)
from calib_nb.faces.verification import VerificationTask, cosine_pairs, read_pairs
from calib_nb.graph.contract import open_session, read_contract
from calib_nb.graph.layers import macs
from calib_nb.graph.model import load_graph
from calib_nb.graph.simplify import simplify

ROOT = Path(__file__).resolve().parents[1]
QUANTIZED = {"edgeface_xxs": "edgeface_xxs_q", "edgeface_xs": "edgeface_xs_q"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine the threads of small operators wait for one another, for seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def awake(module, seed=0):
    """The module with every weight drawn anew, so that no block is scaled to nothing and no two biases are equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            spread = 1 / math.sqrt(max(1, p[0].numel())) if p.ndim > 1 else 0.3
            p.copy_(
                torch.randn(p.shape, generator=generator) * spread
                + (1 if "norm" in name and name.endswith("weight") else 0)
            )
    return module.eval()


def crops(n, seed=1):
    return torch.rand(n, 3, 112, 112, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------- sizes


def convolution_biases(variant):
    """Values that convolutions add a bias to, for one crop."""
    values = []
    with torch.device("meta"):
        module = edgeface(variant)
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda layer, inputs, output: values.append(output.numel()))
        module(torch.empty(1, 3, 112, 112))
    return sum(values)


@pytest.mark.parametrize(
    ("variant", "mparams", "mflops"),
    [
        ("edgeface_xxs", 1.24, 94.72),
        ("edgeface_xs_gamma_06", 1.77, 154.00),
        ("edgeface_s_gamma_05", 3.65, 306.12),
        ("edgeface_base", 18.23, 1398.83),
    ],
)
def test_parameters_and_operations_are_the_published_ones(variant, mparams, mflops):
    row = flops_table([variant]).iloc[0]
    assert (row.published_mparams, row.published_mflops) == (mparams, mflops)
    assert abs(row.mparams - mparams) <= 0.005 + 1e-9  # to the digits that are published
    assert row.mflops == 2 * row.mmacs and abs(row.mflops / mflops - 1) < 0.002
    with_biases = row.mflops + convolution_biases(variant) / 1e6  # as the authors count
    assert abs(with_biases / mflops - 1) < 5e-5


@pytest.mark.parametrize(
    "variant",
    [
        "edgeface_xxs",
        pytest.param("edgeface_xs_gamma_06", marks=pytest.mark.slow),
        pytest.param("edgeface_s_gamma_05", marks=pytest.mark.slow),
        pytest.param("edgeface_base", marks=pytest.mark.slow),
    ],
)
def test_the_exported_graph_has_as_many_multiply_accumulates(variant, tmp_path):
    graph = simplify(load_graph(export_edgeface(edgeface(variant), tmp_path / "m.onnx")))
    channels = EDGENEXT_SIZES[EDGEFACE_VARIANTS[variant].size].channels[1]
    positions = channels * 64 * 14 * 14  # their projection is a constant there
    assert macs(graph).macs.sum() + positions == round(flops_table([variant]).mmacs[0] * 1e6)


def test_a_seed_gives_one_network_and_leaves_torchs_own_alone():
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    a, b, c = edgeface("xs_gamma_06"), edgeface("edgeface_xs_gamma_06"), edgeface("xs_gamma_06", seed=1)
    assert torch.equal(torch.rand(1), wanted)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.model.head.fc.linear1.weight, c.model.head.fc.linear1.weight)
    for unknown in ("", "xss", "edgeface", "edgeface_edgeface_xs"):
        with pytest.raises(InputError, match="unknown variant of EdgeFace"):
            edgeface(unknown)


# ---------------------------------------------------------------- parts, by definition


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9))
def test_positions_are_sines_and_cosines_of_row_and_column(height, width):
    found = fourier_positions(height, width).numpy()
    assert found.shape == (1, 64, height, width)
    row, column, k = height - 1, width // 2, 7  # the eighth pair
    for channel, (at, length) in ((0, (row, height)), (32, (column, width))):
        angle = 2 * math.pi * (at + 1) / (length + 1e-6) / 10000 ** (2 * k / 32)
        assert np.allclose(
            found[0, channel + 2 * k : channel + 2 * k + 2, row, column], [math.sin(angle), math.cos(angle)], atol=1e-6
        )


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from([(8, 2), (12, 4), (6, 1)]), st.integers(1, 7), st.integers(0, 99))
def test_attention_is_its_definition_in_numpy(shape, pixels, seed):
    channels, heads = shape
    attention = awake(CrossCovarianceAttention(channels, heads), seed)
    x = np.random.default_rng(seed).normal(size=(pixels, channels))
    values = {name: p.detach().double().numpy() for name, p in attention.named_parameters()}
    q, k, v = np.split((x @ values["qkv.weight"].T + values["qkv.bias"]).T, 3)  # each [channels, pixels]
    mixed, own = np.empty((channels, pixels)), channels // heads
    for h in range(heads):
        s = slice(h * own, (h + 1) * own)
        cosine = (q[s] / np.linalg.norm(q[s], axis=1, keepdims=True)) @ (
            k[s] / np.linalg.norm(k[s], axis=1, keepdims=True)
        ).T
        weights = np.exp(cosine * values["temperature"][h])
        mixed[s] = weights / weights.sum(1, keepdims=True) @ v[s]
    wanted = mixed.T @ values["proj.weight"].T + values["proj.bias"]
    assert np.allclose(attention(torch.from_numpy(x[None]).float()).detach().numpy()[0], wanted, atol=1e-4)


def test_the_parts_of_a_split_are_convolved_in_a_chain():
    block = awake(SplitTransposeBlock(88, parts=3, heads=4, positions=False))
    seen = []
    block.norm_xca.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 88, 4, 5)
    block(x)
    a = block.convs[0](x[:, :30])
    b = block.convs[1](a + x[:, 30:60])
    wanted = torch.cat([a, b, x[:, 60:]], 1)
    assert torch.allclose(seen[0].transpose(1, 2).reshape(2, 88, 4, 5), wanted, atol=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1), st.booleans())
def test_low_rank_layers_have_the_rank_of_the_paper(inputs, outputs, gamma, bias):
    layer = low_rank(nn.ModuleDict({"fc": nn.Linear(inputs, outputs, bias=bias)}), gamma)["fc"]
    rank = max(2, int(min(inputs, outputs) * gamma))
    assert (
        isinstance(layer, LoRaLin)
        and sum(p.numel() for p in layer.parameters()) == rank * (inputs + outputs) + outputs * bias
    )
    assert layer(torch.zeros(3, 2, inputs)).shape == (3, 2, outputs)


@pytest.mark.parametrize("side", [32, 64, 113])
def test_other_sizes_of_image(side):
    assert edgenext("xx_small", 7)(torch.zeros(2, 3, side, side)).shape == (2, 7)


def test_a_training_step_reaches_every_weight_and_lowers_the_loss():
    module = edgeface("xs_gamma_06").train()
    x, labels = crops(6), torch.tensor([0, 1, 2, 0, 1, 2])
    people = nn.Linear(512, 3)
    optimizer = torch.optim.AdamW([*module.parameters(), *people.parameters()], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(people(module(x)), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # a bias of the keys moves a channel as a whole, and still the gradient is a number
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())
    assert losses[1] < losses[0] and losses[-1] < 0.9 * losses[0]


# ---------------------------------------------------------------- ONNX


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("edgeface_xxs", marks=pytest.mark.slow),
        pytest.param("edgeface_xs", marks=pytest.mark.slow),
        "edgeface_xs_gamma_06",
        pytest.param("edgeface_s_gamma_05", marks=pytest.mark.slow),
        pytest.param("edgeface_base", marks=pytest.mark.slow),
    ],
)
def test_onnx_computes_what_torch_does(variant, tmp_path):
    module = awake(edgeface(variant))
    fixed, dynamic = (
        export_edgeface(module, tmp_path / "fixed.onnx"),
        export_edgeface(module, tmp_path / "a" / "dynamic.onnx", dynamic_batch=True),
    )
    x = crops(4)
    with torch.no_grad():
        wanted = module(x).numpy()
    assert wanted.std() > 0.1
    assert np.abs(open_session(dynamic).run(None, {"input": x.numpy()})[0] - wanted).max() < 1e-4
    assert np.abs(open_session(fixed).run(None, {"input": x[:1].numpy()})[0] - wanted[:1]).max() < 1e-4
    assert read_contract(fixed).inputs[0].shape == (1, 3, 112, 112) and read_contract(dynamic).outputs[0].shape == (
        "batch",
        512,
    )
    assert not {n.op_type for n in load_graph(fixed).nodes} & {"Shape", "Range", "Loop", "If"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", EDGEFACE_VARIANTS)
def test_every_opset_with_an_open_batch(variant, tmp_path):
    module, x = awake(edgeface(variant)), crops(5)
    with torch.no_grad():
        wanted = module(x).numpy()
    for opset in EDGEFACE_OPSETS if variant == "edgeface_xxs" else (EDGEFACE_OPSETS[0], 13, 20, EDGEFACE_OPSETS[-1]):
        file = export_edgeface(module, tmp_path / f"{opset}.onnx", dynamic_batch=True, opset=opset)
        contract = read_contract(file)
        assert (contract.opset, contract.inputs[0].shape) == (opset, ("batch", 3, 112, 112))
        assert np.abs(open_session(file).run(None, {"input": x.numpy()})[0] - wanted).max() < 1e-4
        onnx.checker.check_model(str(file))


@pytest.mark.parametrize("opset", [-1, 8, 24])
def test_an_opset_that_cannot_be_written_is_one_line(opset, tmp_path):
    with pytest.raises(InputError, match=f"opset {opset}; expected 9 to 23"):
        export_edgeface(edgeface("xxs"), tmp_path / "x.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_left(tmp_path):
    module, path = edgeface("xxs"), tmp_path / "m.onnx"
    path.write_text("older")
    with torch.no_grad():
        module.model.stem[0].bias[0] = float("inf")
    with pytest.raises(ModelError, match="differs from the torch module"):
        export_edgeface(module, path)
    assert path.read_text() == "older" and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints with random weights, laid out as the official ones: float, and packed by quantize_dynamic."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for variant in ("edgeface_xxs", "edgeface_xs_gamma_06", "edgeface_s_gamma_05"):
        torch.save(awake(edgeface(variant)).state_dict(), folder / f"{variant}.pt")
    torch.save(
        awake(edgeface("edgeface_xxs")).state_dict(), folder / "old_format.pt", _use_new_zipfile_serialization=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for per, config in (
            ("tensor", torch.ao.quantization.default_dynamic_qconfig),
            ("channel", torch.ao.quantization.per_channel_dynamic_qconfig),
        ):
            packed = torch.ao.quantization.quantize_dynamic(awake(edgeface("edgeface_xxs")), {nn.Linear: config})
            torch.save(packed.state_dict(), folder / f"per_{per}.pt")
    return folder


@pytest.mark.parametrize(
    ("file", "variant"),
    [
        ("edgeface_xxs.pt", "edgeface_xxs"),
        ("old_format.pt", "xxs"),
        ("edgeface_xs_gamma_06.pt", "xs_gamma_06"),
        ("edgeface_s_gamma_05.pt", None),
    ],
)
def test_float_checkpoints_come_back_bit_for_bit(saved, file, variant):
    module = load_edgeface(saved / file, variant)
    wanted = torch.load(saved / file, weights_only=True)
    assert not module.training and list(module.state_dict()) == list(wanted)
    assert all(torch.equal(value, wanted[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_packed_layers_come_out_within_a_step(saved, per):
    state, plain = load_edgeface(saved / f"per_{per}.pt", "xxs").state_dict(), awake(edgeface("xxs")).state_dict()
    for key, value in state.items():
        difference = (value - plain[key]).abs()
        if key.endswith("weight") and any(part in key for part in (".fc", ".qkv.", ".proj.")):
            size = plain[key].abs()
            span = size.amax() if per == "tensor" else size.amax(dim=1, keepdim=True)
            assert (difference <= 1.01 * span / 127).all()
        else:
            assert difference.max() == 0


@pytest.mark.parametrize(
    ("file", "variant", "said"),
    [
        (
            "edgeface_xxs.pt",
            "xs",
            r"its 'model.stem.0.weight' is \[24, 3, 4, 4\] and not \[32, 3, 4, 4\].*it fits edgeface_xxs",
        ),
        ("per_tensor.pt", "base", "it fits edgeface_xxs"),
        (
            "edgeface_xs_gamma_06.pt",
            "edgeface_xs",
            "it has no 'model.stages.0.blocks.0.mlp.fc1.weight'.*it fits edgeface_xs_gamma_06",
        ),
        ("edgeface_s_gamma_05.pt", "s", "unknown variant of EdgeFace 'edgeface_s'.*did you mean"),
        ("nowhere.pt", "xxs", "no such checkpoint"),
        (".", "xxs", "no such checkpoint"),
    ],
)
def test_the_wrong_variant_is_one_clear_line(saved, file, variant, said):
    with pytest.raises(InputError, match=said) as e:
        load_edgeface(saved / file, variant)
    assert "\n" not in str(e.value)


def packed_layer(values):
    """A state dict with the key of a packed layer."""
    return {"a._packed_params._packed_params": values}


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        torch.zeros(2),
        {},
        {"state_dict": {"a": torch.zeros(2)}},
        {1: torch.zeros(2)},
        {"epoch": 3},
        "text",
        None,
        packed_layer(torch.zeros(3)),
        packed_layer((torch.zeros(3), None, None)),
        packed_layer(("b", "c")),
        {"model.stem.0.weight": torch.zeros(2)},
    ],
)
def test_a_file_that_is_no_state_dict_of_edgeface_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ModelError) as e:
        load_edgeface(tmp_path / "c.pt", "xxs")
    assert "\n" not in str(e.value) and "c.pt" in str(e.value)


def small_checkpoint():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(
            torch.ao.quantization.quantize_dynamic(
                nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), {nn.Linear}
            ).state_dict(),
            file,
        )
    return file.getvalue()


SMALL = small_checkpoint()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.integers(0, len(SMALL)),
        st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6),
    )
)
def test_damage_anywhere_is_refused_or_harmless(tmp_path_factory, damage):
    data = bytearray(SMALL)
    if isinstance(damage, int):
        del data[damage:]
    else:
        for at, value in damage:
            data[at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(data)
    try:
        assert all(isinstance(value, torch.Tensor) for value in read_edgeface(path).values())
    except ModelError as e:
        assert "\n" not in str(e) and "damaged.pt" in str(e)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("where", ["value", "key", "packed", "whole", "old_format", "bare_pickle"])
@pytest.mark.parametrize("function", ["mkdir", "system", "eval", "getattr", "pickle", "subprocess"])
def test_hostile_pickles_do_nothing(where, function, tmp_path):
    mark = tmp_path / "was here"
    call = {
        "mkdir": Call(os.mkdir, str(mark)),
        "system": Call(os.system, f"mkdir '{mark}'"),
        "eval": Call(eval, f"__import__('os').mkdir({str(mark)!r})"),
        "getattr": Call(Path.touch, mark),
        "pickle": Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(mark)))),
        "subprocess": Call(subprocess.call, ["mkdir", str(mark)]),
    }[function]
    content = {
        "key": {call: torch.zeros(1)},
        "packed": {"a._packed_params._packed_params": (call, None), "a._packed_params.dtype": torch.qint8},
        "whole": call,
    }.get(where, {"model.stem.0.weight": call})
    path = tmp_path / "hostile.pt"
    if where == "bare_pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "old_format")
    with pytest.raises(ModelError):
        load_edgeface(path, "xxs")
    assert not mark.exists()
    if where != "bare_pickle":  # and it would have done something
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_a_pickle_hidden_beside_the_weights_does_nothing(tmp_path, saved):
    path, mark = tmp_path / "c.pt", tmp_path / "was here"
    path.write_bytes((saved / "edgeface_xxs.pt").read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("edgeface_xxs/constants.pkl", pickle.dumps(Call(os.mkdir, str(mark))))
    try:
        read_edgeface(path)
    except ModelError as e:
        assert "c.pt" in str(e)
    assert not mark.exists()


def test_torch_is_imported_only_by_what_needs_it():
    code = "import calib_nb.faces.edgeface, calib_nb.commands.faces, sys; "
    code += "sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- torch.hub and the command


def test_torch_hub_offers_every_variant(saved):
    entries = {
        name: found
        for name, found in runpy.run_path(str(ROOT / "hubconf.py")).items()
        if callable(found) and not name.startswith("_")
    }
    assert sorted(entries) == sorted(EDGEFACE_VARIANTS) and all(
        "[N,3,112,112]" in entry.__doc__ for entry in entries.values()
    )
    loaded = torch.hub.load(str(ROOT), "edgeface_xxs", source="local", checkpoint=str(saved / "edgeface_xxs.pt"))
    fresh = torch.hub.load(str(ROOT), "edgeface_xs_gamma_06", source="local")
    x = crops(1)
    with torch.no_grad():
        assert (
            torch.equal(loaded(x), load_edgeface(saved / "edgeface_xxs.pt")(x))
            and fresh(x).shape == (1, 512)
            and not fresh.training
        )
    with pytest.raises(ModelError, match="it fits edgeface_xxs"):
        torch.hub.load(str(ROOT), "edgeface_base", source="local", checkpoint=str(saved / "edgeface_xxs.pt"))


def test_the_command_exports_and_refuses(saved, tmp_path, capsys):
    output = tmp_path / "made" / "m.onnx"
    line = ["faces", "export", "--checkpoint", str(saved / "per_tensor.pt")]
    assert main([*line, "--variant", "xxs", "--output", str(output)]) == 0
    assert "1,244,744 parameters" in capsys.readouterr().out
    x = crops(1)
    with torch.no_grad():
        assert (
            np.abs(
                open_session(output).run(None, {"input": x.numpy()})[0]
                - load_edgeface(saved / "per_tensor.pt")(x).numpy()
            ).max()
            < 1e-4
        )
    before = (saved / "per_tensor.pt").read_bytes()
    for wrong in (
        [*line, "--variant", "base", "--output", str(tmp_path / "no.onnx")],
        [*line, "--output", str(saved / "per_tensor.pt")],
        ["faces", "export", "--checkpoint", "nowhere.pt", "--output", str(tmp_path / "no.onnx")],
    ):
        assert main(wrong) == 2
        said = capsys.readouterr()
        assert said.err.startswith("calib-nb: ") and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "no.onnx").exists() and (saved / "per_tensor.pt").read_bytes() == before


# ---------------------------------------------------------------- the authors' checkpoints


@pytest.mark.parametrize("variant", QUANTIZED)
def test_the_authors_checkpoints_have_our_keys_and_shapes(real_data, variant):
    raw = torch.load(real_data / "models" / f"{QUANTIZED[variant]}.pt", map_location="cpu", weights_only=True)
    module = edgeface(variant)
    linear = {name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    assert {
        key.removesuffix("._packed_params._packed_params")
        for key in raw
        if key.endswith("._packed_params._packed_params")
    } == linear
    plain = {
        key: tuple(value.shape)
        for key, value in raw.items()
        if key.rpartition(".")[0].removesuffix("._packed_params") not in linear
    }
    ours = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert (
        list(plain) == [key for key in ours if key.rpartition(".")[0] not in linear] and plain.items() <= ours.items()
    )


@pytest.mark.parametrize("variant", QUANTIZED)
def test_the_authors_checkpoints_compute_what_their_onnx_files_do(real_data, variant, tmp_path):
    module = load_edgeface(real_data / "models" / f"{QUANTIZED[variant]}.pt", variant)
    x = crops(8)
    with torch.no_grad():
        found = module(x).numpy()
    wanted = open_session(real_data / "models" / f"{QUANTIZED[variant]}_dequant.onnx").run(None, {"input": x.numpy()})[
        0
    ]
    assert wanted.std() > 0.05 and np.abs(found - wanted).max() < 1e-4
    exported = open_session(export_edgeface(module, tmp_path / "m.onnx", dynamic_batch=True)).run(
        None, {"input": x.numpy()}
    )[0]
    assert np.abs(exported - wanted).max() < 1e-4
    other = next(v for v in QUANTIZED if v != variant)
    with pytest.raises(ModelError, match=f"it fits {variant}$"):
        load_edgeface(real_data / "models" / f"{QUANTIZED[variant]}.pt", other)


def embed_lfw(real_data, rows):
    """By variant: pairs of LFW DevTest with both faces as a task, and the embeddings of torch and of the ONNX file."""
    pairs = read_pairs(real_data / "lfw" / "pairsDevTest.txt", real_data / "lfw" / "images")
    table = pairs.table.iloc[rows].reset_index(drop=True)
    photos = sorted(set(table["first"]) | set(table["second"]))
    files = [real_data / "lfw" / "images" / photo for photo in photos]
    faces = detect_opencv(real_data / "models" / "face_detection_yunet_2023mar.onnx", files, progress=False)
    aligned = {
        photo: align(
            decode(file),
            found.landmarks[np.argmin(np.linalg.norm((found.boxes[:, :2] + found.boxes[:, 2:]) / 2 - 125, axis=1))],
        )
        for photo, file, found in zip(photos, files, faces)
        if len(found)
    }
    task, chain = VerificationTask(aligned, table), preset("edgeface")
    x = np.concatenate([chain(crop) for crop in task.samples])
    for variant, file in QUANTIZED.items():
        module, session = (
            load_edgeface(real_data / "models" / f"{file}.pt"),
            open_session(real_data / "models" / f"{file}_dequant.onnx"),
        )
        with torch.no_grad():
            ours = np.concatenate([module(torch.from_numpy(x[k : k + 64])).numpy() for k in range(0, len(x), 64)])
        theirs = np.concatenate([session.run(None, {"input": x[k : k + 64]})[0] for k in range(0, len(x), 64)])
        yield variant, task, ours, theirs


def check_lfw(real_data, rows):
    accuracies = {}
    for variant, task, ours, theirs in embed_lfw(real_data, rows):
        assert np.abs(ours - theirs).max() < 1e-4 and task.left_out <= 0.02 * len(task.pairs)
        a, b = (cosine_pairs(dict(zip(task.photos, embeddings)), task.pairs) for embeddings in (ours, theirs))
        assert np.abs(a - b).max() < 1e-5
        found, wanted = (
            task.metrics(task.units([{"e": e} for e in own], [{"e": e} for e in theirs])) for own in (ours, theirs)
        )
        assert found["accuracy"] == wanted["accuracy"] and abs(found["auc"] - wanted["auc"]) < 1e-6
        accuracies[variant] = found["accuracy"]
    return accuracies


def test_real_faces_are_told_apart_as_by_the_onnx_files(real_data):
    accuracies = check_lfw(real_data, np.r_[0:500:10, 500:1000:10])
    assert min(accuracies.values()) >= 0.97


@pytest.mark.slow
def test_lfw_devtest_accuracy_is_that_of_the_onnx_files(real_data):
    accuracies = check_lfw(real_data, slice(None))
    assert min(accuracies.values()) >= 0.99
