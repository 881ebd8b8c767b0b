"""The backbone compiled layer by layer, and what happens where it cannot be compiled."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from pipeline.model.backbone import FrozenBackbone
from pipeline.model.compiled import compile_layers


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing is compiled before, and nothing afterwards."""
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    torch._dynamo.reset()
    counters.clear()
    with inductor.patch(compile_threads=7):
        yield
    torch._dynamo.reset()


@pytest.fixture
def backbone():
    return FrozenBackbone("scenes-tiny")


VIEWS = torch.randint(0, 256, (2, 32, 32, 3), generator=torch.manual_seed(0), dtype=torch.uint8).permute(0, 3, 1, 2)


def first_pass(backbone):
    return lambda: backbone(VIEWS)


def test_layers_share_one_compilation_that_does_not_depend_on_the_memory_layout(backbone, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx", lambda graph, inputs, **_: compiled.append(graph) or graph.forward
    )
    expected = backbone(VIEWS)
    assert compile_layers(backbone.model, first_pass(backbone), threads=1)
    for views in (VIEWS, VIEWS.contiguous()):
        for ours, theirs in zip(backbone(views), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert len(compiled) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="nothing to compile with")
def test_a_compiled_backbone_gives_the_same_tokens(backbone):
    expected = backbone(VIEWS)
    assert compile_layers(backbone.model, first_pass(backbone), threads=1)
    for ours, theirs in zip(backbone(VIEWS), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_without_a_compiler_a_line_says_so_and_the_backbone_goes_on(backbone, capsys, tmp_path):
    expected = backbone(VIEWS)
    with inductor.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),), "force_disable_caches": True}):
        assert not compile_layers(backbone.model, first_pass(backbone), threads=1)
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "the backbone cannot be compiled here (" in line]) == 1
    for ours, theirs in zip(backbone(VIEWS), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_an_error_without_words_is_named_by_its_kind(backbone, capsys):
    def fail():
        raise RuntimeError("outer\nlines") from ModuleNotFoundError()

    assert not compile_layers(backbone.model, fail, threads=1)
    assert "cannot be compiled here (ModuleNotFoundError); it goes on uncompiled" in capsys.readouterr().err


def test_too_little_memory_is_no_reason_to_go_on_uncompiled(backbone):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compile_layers(backbone.model, fail, threads=1)


def test_the_variable_of_torch_comes_before_the_given_threads(backbone, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")
    compile_layers(backbone.model, lambda: None, threads=3)
    assert inductor.compile_threads == 7
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS")
    compile_layers(backbone.model, lambda: None, threads=3)
    assert inductor.compile_threads == 3
