"""Tensors saved from an engine, set in another of the same or of any other form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.parity_cells import STEPS, Cell, bare_loop, batch, build, run
from pipeline.model.roadwork import RoadworkModel
from pipeline.optim.config import OptimConfig

pytestmark = pytest.mark.dist
HALF = STEPS // 2
FORMS = {  # name to where it goes on from, and how
    "same": ("sharded", Cell(2, 2, 2)),
    "two to two, ZeRO-1, whole experts": ("sharded", Cell(1, 1, 2, 2)),
    "ZeRO-3 again": ("cut", Cell(3, 1, 2)),
    "two to four, ZeRO-3, experts over four": ("sharded", Cell(3, 4, 4)),
    "ZeRO-3 to ZeRO-2, experts over two of four": ("cut", Cell(2, 2, 4)),
    "two to one": ("sharded", Cell(2, 1, 1)),
    "ZeRO-3 to one, ZeRO-0": ("cut", Cell(0, 1, 1)),
    "Sophia, two to one": ("sophia", Cell(1, 1, 1, 2)),
    "Sophia, two to two, ZeRO-1, whole experts": ("sophia", Cell(1, 1, 2)),
}
SOPHIA = [name for name, (source, _) in FORMS.items() if source == "sophia"]
BACK = {"sharded, back": Cell(2, 2, 2), "cut, back": Cell(3, 1, 2)}
BITWISE = {"same": "sharded", "ZeRO-3 again": "cut"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Curves of two runs without a break and of all that go on from their middle, and the folder of what they left."""
    folder = tmp_path_factory.mktemp("tensors")
    cells = {
        "sharded": Cell(2, 2, 2, save=str(folder / "sharded"), export=str(folder / "sharded-model")),
        "cut": Cell(3, 1, 2, save=str(folder / "cut"), export=str(folder / "cut-model")),
        "sophia": Cell(2, 2, 2, optimizer="sophia_h", save=str(folder / "sophia")),
    }
    for name, cell in BACK.items():
        cells[name] = replace(cell, save=str(folder / name), export=str(folder / f"{name}-model"), again=True)
    for name, (source, cell) in FORMS.items():
        places = {"resume": str(folder / source), "export": str(folder / f"{name}-model")}
        if source == "sophia":  # written again where it was read, by other processes
            places["save"] = str(folder / f"{name}-again")
        cells[name] = replace(cell, optimizer=cells[source].optimizer, **places)
    curves = {}
    for processes in (2, 4, 1):
        names = [name for name, cell in cells.items() if cell.processes == processes]
        curves |= dict(zip(names, run([cells[name] for name in names]), strict=True))
    bare = bare_loop(Cell(1, 1, 1, export=str(folder / "bare-model")))
    bares = dict.fromkeys(cells, bare) | dict.fromkeys(SOPHIA, bare_loop(Cell(1, 1, 1, optimizer="sophia_h")))
    return curves, bares, folder


@pytest.mark.parametrize("name", FORMS)
def test_a_run_goes_on_in_any_form(world, name):
    curves, bares, _ = world
    rel = 1e-5 if name in SOPHIA else 1e-6  # a step that is clipped to a sign does not shrink with its gradient
    assert len(curves[name].losses) == STEPS - HALF
    assert curves[name].losses[:, 0] == pytest.approx(curves[FORMS[name][0]].losses[HALF:, 0], rel=rel)
    assert curves[name].losses[:, 0] == pytest.approx(bares[name].losses[HALF:, 0], rel=rel)


@pytest.mark.parametrize("name", SOPHIA)
def test_what_other_processes_write_again_is_what_they_read(world, name):
    """So two processes may go on from one that went on from two."""
    for file in ("weights", "moments"):
        first, again = (load_file(world[2] / place / f"{file}.safetensors") for place in ("sophia", f"{name}-again"))
        assert first.keys() == again.keys()
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_the_curvature_matters_for_what_comes_after(world):
    """Otherwise it could be lost on the way, and nobody would see it."""
    moments = load_file(world[2] / "sophia" / "moments.safetensors")
    assert {key.rpartition("/")[2] for key in moments} == {"exp_avg", "hessian"}
    mean, curvature = (moments[f"head.join.0.weight/{kind}"] for kind in ("exp_avg", "hessian"))
    held_back = mean.abs() < OptimConfig().gamma * curvature  # the others' step is a sign, whatever their curvature
    assert held_back.float().mean() > 0.05


@pytest.mark.parametrize("name", BACK)
def test_an_engine_that_has_gone_on_goes_back_to_what_it_saved(world, name):
    curves, bares, _ = world
    assert curves[name].losses[:, 0] == pytest.approx(bares[name].losses[HALF:, 0], rel=1e-6)


@pytest.mark.parametrize(("name", "source"), BITWISE.items())
def test_in_the_same_form_it_goes_on_bit_for_bit(world, name, source):
    curves = world[0]
    assert np.array_equal(curves[name].losses, curves[source].losses[HALF:])
    assert np.array_equal(curves[name].norms, curves[source].norms[HALF:])


@pytest.mark.parametrize("source", ["sharded", "cut"])
def test_names_and_shapes_are_those_of_the_model_as_it_was_built(world, source):
    expected = {name: p.shape for name, p in build(Cell(1, 1, 1)).named_parameters()}
    for file in ("weights", "average"):
        assert {name: t.shape for name, t in load_file(world[2] / source / f"{file}.safetensors").items()} == expected
    moments = load_file(world[2] / source / "moments.safetensors")
    assert {name: t.shape for name, t in moments.items()} == {
        f"{name}/{kind}": shape for name, shape in expected.items() for kind in ("exp_avg", "exp_avg_sq")
    }


@pytest.mark.parametrize("name", ["sharded", "cut", *BACK, *(form for form in FORMS if form not in SOPHIA)])
@torch.inference_mode()
def test_the_saved_average_answers_as_that_of_a_bare_loop(world, name):
    """So it holds every expert, each in its place."""
    ours, bare = (RoadworkModel.from_pretrained(world[2] / f"{which}-model").eval() for which in (name, "bare"))
    fresh = build(Cell(1, 1, 1)).eval()
    photos = batch(STEPS, range(8), bare)
    expected = bare(photos).logits
    torch.testing.assert_close(ours(photos).logits, expected, rtol=1e-4, atol=1e-5)
    assert (fresh(photos).logits - expected).abs().max() > 1e-2
