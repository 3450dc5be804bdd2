"""The drawing of a network and of ranges, against onnx and NumPy, and the page that holds them."""

import html
import json
import re
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from calib_nb.analysis.diagnose import diagnose_model
from calib_nb.analysis.diagnosis_page import diagnosis_page, node_looks, rows_of_nodes
from calib_nb.analysis.graph_view import Look, corners_and_edges, draw_graph, graph_layout, layer_numbers
from calib_nb.analysis.range_view import THIS_FILE, tensor_views
from calib_nb.core.errors import ModelError
from calib_nb.data.preprocess import preset
from calib_nb.graph import build
from calib_nb.graph.fixed import fix_batch
from calib_nb.graph.model import Graph, load_graph, open_graph
from calib_nb.quant.observe import observe
from calib_nb.quant.quantize import quantize_static

EVIL = "\"/><script>alert(1)</script>&'"


def chain(bgr):
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


IMAGES = list(np.random.default_rng(7).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))


def edges_of(model) -> list[tuple[str, str]]:
    """Edges by onnx alone: what a node, or the graph's outputs, read of what nodes and inputs make."""
    constants = {t.name for t in model.graph.initializer}
    constants |= {o for n in model.graph.node if n.op_type == "Constant" for o in n.output}
    makers = {i.name: f"in {i.name}" for i in model.graph.input if i.name not in constants}
    nodes = [(f"{k}", n) for k, n in enumerate(model.graph.node) if n.op_type != "Constant"]
    makers |= {o: key for key, n in nodes for o in n.output if o}
    edges = [(makers[i], key) for key, n in nodes for i in dict.fromkeys(n.input) if i in makers]
    return sorted(edges + [(makers[o.name], f"out {o.name}") for o in model.graph.output if o.name in makers])


def drawn_edges(graph: Graph, drawing: str) -> list[tuple[str, str]]:
    corners, _ = corners_and_edges(graph)
    words = {"input": "in ", "output": "out "}
    keys = [str(c.at) if c.kind == "node" else words[c.kind] + c.name for c in corners]
    pairs = re.findall(r'data-edge="(\d+) (\d+)"', drawing)
    return sorted((keys[int(a)], keys[int(b)]) for a, b in pairs)


def check_drawing(graph: Graph, drawing: str) -> None:
    root = ElementTree.fromstring(f"<all>{drawing}</all>")  # well-formed
    nodes = [int(e.get("data-node")) for e in root.iter() if e.get("data-node")]
    assert sorted(nodes) == [k for k, n in enumerate(graph.nodes) if n.op_type != "Constant"]
    assert drawn_edges(graph, drawing) == edges_of(graph.model)


@st.composite
def networks(draw):
    """Networks of up to a dozen nodes with branches, several outputs and tensors that are read twice."""
    tensors, nodes = ["x"], []
    for k in range(draw(st.integers(1, 12))):
        sources = draw(st.lists(st.sampled_from(tensors), min_size=1, max_size=3))
        outputs = [f"t{k}", f"u{k}"][: draw(st.integers(1, 2))]
        op = "Split" if len(outputs) == 2 else "Sum"
        nodes.append(
            helper.make_node(op, sources[:1] if op == "Split" else sources, outputs, name=draw(st.text(max_size=5)))
        )
        tensors += outputs
    value = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 4))
        for n in ("x", *draw(st.sets(st.sampled_from(tensors), min_size=1)))
    ]
    return helper.make_model(
        helper.make_graph(nodes, "g", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )


@settings(max_examples=40, derandomize=True, deadline=None)
@given(networks(), st.sampled_from([0, 150, 900]))
def test_every_node_once_and_the_edges_of_the_graph(model, part):
    graph = Graph(model)
    names = [n.name for n in graph.nodes]
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 or ord(c) in (0xFFFE, 0xFFFF) for name in names for c in name):
        return  # no XML holds them; HTML does
    check_drawing(graph, draw_graph(graph, part=part))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.integers(2, 14).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n - 2), st.integers(1, n - 1)), max_size=25))
    )
)
def test_boxes_do_not_overlap_and_edges_go_down(drawn):
    count, pairs = drawn
    edges = [(a, b) for a, b in pairs if a < b]
    layers = layer_numbers(count, edges)
    assert all(layers[a] < layers[b] for a, b in edges)
    layout = graph_layout(count, edges)
    for level in set(layers):
        x = np.sort(layout.places[[k for k in range(count) if layers[k] == level], 0])
        assert (np.diff(x) > 164).all()
    for (a, b), points in zip(edges, layout.edges):
        assert np.allclose([points[0], points[-1]], layout.places[[a, b]])
        assert len(points) == layers[b] - layers[a] + 1 and (np.diff([p[1] for p in points]) > 0).all()
    assert layout.places[:, 0].min() > 82 and layout.places[:, 0].max() + 82 < layout.size[0]


def test_a_chain_is_straight_and_text_is_escaped():
    graph = build.sequential(*["Relu"] * 5, shape=(1, 3, 4, 4))
    for k, node in enumerate(graph.nodes):
        node.name = f"{EVIL}{k}"
    looks = {0: Look("#D55E00", EVIL, EVIL, dashed=True)}
    drawing = draw_graph(graph, looks)
    check_drawing(graph, drawing)
    assert "C" not in "".join(re.findall(r' d="([^"]*)"', drawing)), "an edge of a chain bends"
    root = ElementTree.fromstring(drawing)
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any(f"{EVIL}3" in title for title in titles) and any("1×3×4×4" in title for title in titles)


def test_inner_graphs_and_constants():
    """What an If reads from outside is an edge; a Constant node and an initializer are not drawn."""
    inner = helper.make_graph(
        [helper.make_node("Relu", ["a"], ["z"])],
        "then",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    flag = helper.make_tensor("flag", TensorProto.BOOL, (), [True])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=flag),
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("If", ["c"], ["y"], name="choice", then_branch=inner, else_branch=inner),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 4)) for n in "xy"]
    graph = Graph(helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:])))
    corners, edges = corners_and_edges(graph)
    assert [(corners[a].name, corners[b].name) for a, b, _ in edges] == [
        ("x", "first"),
        ("first", "choice"),
        ("choice", "y"),
    ]


@pytest.mark.parametrize(("nodes", "most"), [(200, 150), pytest.param(2000, 1500, marks=pytest.mark.slow)])
def test_a_large_network_is_bounded(nodes, most):
    """Long edges everywhere: time and size grow with the nodes that are drawn."""
    text = ["t0 = Relu (x)"] + [f"t{k} = Add (t{k - 1}, t{max(0, k - 30)})" for k in range(1, nodes)]
    graph = build.network("; ".join([*text, f"y = Relu (t{nodes - 1})"]), inputs={"x": (1, 2, 2, 2)})
    begin = time.process_time()
    drawing = draw_graph(graph, part=900, most=most)
    assert time.process_time() - begin < 20
    assert drawing.count("data-node=") == most and len(drawing) < 2500 * most


def test_ranges_against_numpy():
    graph = build.sequential(build.conv(4), "Relu", shape=(1, 3, 8, 8))
    stats = observe(graph, IMAGES, chain, progress=False)
    session = [graph.nodes[-1].output[0]]
    run = open_graph(graph, session)
    values = np.concatenate([run.run(session, {graph.inputs[0]: chain(i)})[0].ravel() for i in IMAGES]).astype(
        np.float64
    )
    cut = float(np.quantile(values, 0.9))
    view = next(v for v in tensor_views(stats, {session[0]: (0.0, cut)}) if v.tensor == session[0])
    assert (view.low, view.high, view.values) == (values.min(), values.max(), values.size)
    assert view.clipped[THIS_FILE] == pytest.approx((values > cut * (1 + 1 / 510)).mean(), abs=0.005)
    counts, _ = np.histogram(values, len(view.bars), (values.min(), values.max()))
    assert np.abs(np.cumsum(view.bars) - np.cumsum(counts)).max() < 0.01 * values.size
    scale = cut / 255
    rounded = np.clip(np.rint(values / scale), 0, 255) * scale
    exact = 10 * np.log10(np.square(values).sum() / np.square(values - rounded).sum())
    assert view.sqnr_db[THIS_FILE] == pytest.approx(exact, abs=0.2)


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed")
    block = build.residual(build.conv(8), build.norm(), "Relu", build.conv(8, 1))
    graph = build.sequential(build.conv(8), "Relu", block, "GlobalAveragePool", build.linear(4), shape=(1, 3, 8, 8))
    for k, node in enumerate(graph.nodes):
        node.name = f"{EVIL}{k}"
    model = graph.save(folder / "m.onnx")
    broken = onnx.load(
        quantize_static(model, IMAGES, chain, folder / "q.onnx", profile="per-tensor-npu", progress=False).path
    )
    inner = [n.input[1] for n in broken.graph.node if n.op_type == "QuantizeLinear"][1]
    scale = next(t for t in broken.graph.initializer if t.name == inner)
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) / np.float32(30), scale.name))
    onnx.save(broken, folder / "b.onnx")
    return diagnose_model(model, folder / "b.onnx", IMAGES, chain, progress=False), folder


def test_a_page_of_hostile_names(diagnosed):
    diagnosis, folder = diagnosed
    page = diagnosis_page(diagnosis, folder / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and page.count("<script>") == 2 and EVIL not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "@import" not in page
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)
    listed = re.search(r'<pre id="exclude-1">(.*?)</pre>', page, re.S)
    assert diagnosis.excludable and json.loads(html.unescape(listed[1])) == diagnosis.excludable
    assert page.count('class="rs"') == len(diagnosis.table)


def test_each_row_has_its_nodes(diagnosed):
    diagnosis, _ = diagnosed
    rows = rows_of_nodes(diagnosis.graph, diagnosis.table)
    first = {diagnosis.table.node[r] for r in rows.values()}
    assert first == set(diagnosis.table.node[diagnosis.table.op != "Input"])
    looks = node_looks(diagnosis)
    noted = [k for k, look in looks.items() if look.note]
    assert sorted(diagnosis.graph.nodes[k].name for k in noted) == sorted(first)


def test_a_page_without_histograms(diagnosed, monkeypatch):
    """A tensor of minus infinity, as a mask has, is no reason to refuse what else can be said."""

    def refuse(*_, **__):
        raise ModelError("tensor 'm' is not finite")

    monkeypatch.setattr("calib_nb.analysis.diagnose.observe", refuse)
    _, folder = diagnosed
    diagnosis = diagnose_model(folder / "m.onnx", folder / "b.onnx", IMAGES, chain, progress=False)
    page = diagnosis_page(diagnosis, folder / "plain.html").read_text(encoding="utf-8")
    assert diagnosis.stats is None and "What clips</h2>" not in page and "so there are no histograms" in page


@pytest.mark.slow
def test_real_networks(real_data, tmp_path):
    """EdgeFace-XXS and YuNet: the edges of their files, in less than three seconds."""
    files = [fix_batch(real_data / "models" / "edgeface_xxs_q_dequant.onnx", tmp_path / "edge.onnx")]
    for path in [*files, real_data / "models" / "face_detection_yunet_2023mar.onnx"]:
        graph = load_graph(path)
        begin = time.process_time()
        drawing = draw_graph(graph, part=900)
        assert time.process_time() - begin < 3 and len(drawing) < 1_000_000
        check_drawing(graph, drawing)
    model = real_data / "models" / "face_detection_yunet_2023mar.onnx"
    images = sorted((real_data / "faces_multi" / "ub").rglob("*.jpg"))[:4]
    see = preset("yunet", size=(640, 640))
    int8 = quantize_static(model, images, see, tmp_path / "q.onnx", progress=False).path
    page = diagnosis_page(diagnose_model(model, int8, images, see, progress=False), tmp_path / "page.html")
    assert page.stat().st_size < 3_000_000
