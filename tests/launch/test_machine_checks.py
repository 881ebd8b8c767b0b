"""What doctor says of machines that are not this one: with other drivers, containers, networks and hubs."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import psutil
import pytest
import torch

from pipeline.config import ACCELERATE_CONFIGS, find_recipe, read_config
from pipeline.doctor import doctor
from pipeline.errors import AuditFailed
from pipeline.launch import checks, machine_checks, machine_facts
from pipeline.launch.findings import BAD, GIB, GOOD, NOTE, Finding, print_findings
from pipeline.launch.machine_checks import backbone, cudnn, driver, gpus, host_memory, network, shared_memory
from pipeline.model.backbone import vith16plus_config
from pipeline.training.memory import count

HUB_ID = "org/dinov3"
NODE = ACCELERATE_CONFIGS / "node_8.yaml"
CARD = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "LD_LIBRARY_PATH", *machine_checks.INTERFACE_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def facts(monkeypatch):
    """Set facts of the machine."""

    def be(**values):
        for name, value in values.items():
            monkeypatch.setattr(machine_facts, name, lambda value=value: value)

    return be


@pytest.fixture
def torch_with(monkeypatch):
    """Let torch have a CUDA and some GPUs."""

    def be(cuda="13.0", gpus=1, cudnn=91600):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(machine_checks, "uses_gpu", lambda: gpus > 0)
        monkeypatch.setattr(machine_checks, "gpu_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: CARD)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)

    return be


def only(findings):
    (found,) = findings
    return found.verdict, found.text


@pytest.mark.parametrize(
    ("theirs", "ours", "verdict", "words"),
    [
        ((12, 2), "13.0", BAD, ("535.183.01, for CUDA up to 12.2", "built for CUDA 13.0", "580 or newer", "whl/cu126")),
        ((11, 4), "12.6", BAD, ("up to 11.4", "update the driver to 525 or newer")),
        ((13, 1), "13.0", GOOD, ("torch has CUDA 13.0",)),
        ((12, 2), "12.6", GOOD, ("torch has CUDA 12.6",)),  # one major version is compatible
        ((13, 0), "12.6", GOOD, ("torch has CUDA 12.6",)),
    ],
)
def test_the_driver_must_run_the_cuda_of_torch(facts, torch_with, theirs, ours, verdict, words):
    facts(driver_cuda=theirs, driver_version="535.183.01")
    torch_with(cuda=ours)
    found, text = only(driver())
    assert found == verdict
    assert all(word in text for word in words)
    assert ("whl/cu126" in text) == (theirs[0] == 12 and verdict == BAD)  # which a driver for 11 does not run either


@pytest.mark.parametrize(("theirs", "ours"), [(None, "13.0"), ((13, 0), None)])
def test_without_a_driver_or_a_torch_with_cuda_there_is_nothing_to_compare(facts, torch_with, theirs, ours):
    facts(driver_cuda=theirs)
    torch_with(cuda=ours)
    assert not list(driver())


def test_a_gpu_that_torch_does_not_see_beside_others_is_noted(facts, torch_with, monkeypatch):
    facts(gpus_of_the_system=8)
    torch_with(gpus=7)
    *found, last = gpus()
    assert [finding.text for finding in found] == ["NVIDIA H100, 80 GiB"] * 7
    assert (last.verdict, last.text[:41]) == (NOTE, "the system has 8 GPUs and torch sees 7; `")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6")  # on purpose
    assert len(list(gpus())) == 7


def test_gpus_that_are_hidden_are_told_from_none(facts, torch_with, monkeypatch):
    facts(gpus_of_the_system=8)
    torch_with(gpus=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    verdict, text = only(gpus())
    assert verdict == NOTE
    assert text.startswith("none (8 hidden by CUDA_VISIBLE_DEVICES=): training runs on the CPU")


@pytest.mark.parametrize(
    ("version", "path", "verdict", "words"),
    [
        (91600, "", GOOD, "9.16.0; training takes other kernels"),
        (91300, "", NOTE, "9.13.0: too old for `prep features --attention cudnn`, which needs 9.15.1"),
        (91300, "/usr/local/cuda/lib64", NOTE, "unset it"),
    ],
)
def test_an_old_cudnn_is_noted_with_what_may_hide_a_new_one(torch_with, monkeypatch, version, path, verdict, words):
    torch_with(cudnn=version)
    monkeypatch.setenv("LD_LIBRARY_PATH", path)
    found, text = only(cudnn())
    assert found == verdict
    assert words in text
    torch_with(gpus=0)
    assert not list(cudnn())


def test_dockers_default_of_64_mb_is_too_little_for_the_loaders(facts):
    facts(shared_memory=(64 * 2**20, 64 * 2**20))
    verdict, text = only(shared_memory(20 * GIB, 8))
    assert verdict == BAD
    assert "20.00 GiB for the batches of 8 processes, 0.06 of 0.06 free" in text
    assert "`--shm-size 21g` or `--ipc=host`" in text
    facts(shared_memory=(200 * GIB, 250 * GIB))
    assert only(shared_memory(20 * GIB, 8))[0] == GOOD
    facts(shared_memory=None)
    assert not list(shared_memory(20 * GIB, 8))


@pytest.mark.parametrize(("needed", "verdict"), [(50, GOOD), (150, NOTE), (300, BAD)])
def test_the_host_must_hold_what_all_its_processes_keep_there(facts, needed, verdict):
    facts(host_memory=(100 * GIB, 200 * GIB))
    found = host_memory(needed * GIB, 8)
    assert found.verdict == verdict
    assert f"{needed}.0 GiB of the host's memory for 8 processes, 100 of 200 free" in found.text
    assert ("--mem" in found.text) == (verdict != GOOD)


ADDRESSES = {"eth0": "10.0.0.3", "ib0": "10.1.0.3"}


def test_a_name_that_stands_for_the_loopback_is_where_no_other_machine_looks(facts, monkeypatch):
    facts(interfaces=ADDRESSES, host_address="127.0.1.1")
    verdict, text = only(network(2))
    assert verdict == BAD
    assert "127.0.1.1" in text
    assert "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in text
    assert "eth0 (10.0.0.3), ib0 (10.1.0.3)" in text
    assert only(network(2, here=False))[0] == NOTE  # training will run on machines that may have other names
    assert not list(network(1))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert only(network(2)) == (GOOD, "GLOO_SOCKET_IFNAME=ib0; interfaces: eth0 (10.0.0.3), ib0 (10.1.0.3)")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    facts(host_address="10.0.0.3")
    assert only(network(2)) == (
        GOOD, "this machine's name is 10.0.0.3; interfaces: eth0 (10.0.0.3), ib0 (10.1.0.3)"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("GLOO_SOCKET_IFNAME", "eth1", "names eth1, which is no interface of this machine that is up"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib1", "names ib1, which is no interface"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", None),
        ("GLOO_SOCKET_IFNAME", "eth", "names eth, which is no interface"),  # only NCCL takes beginnings
        ("NCCL_SOCKET_IFNAME", "eth", None),
        ("NCCL_SOCKET_IFNAME", "enp,ib", None),
        ("NCCL_SOCKET_IFNAME", "enp", "leaves no interface of this machine that is up"),
        ("NCCL_SOCKET_IFNAME", "=eth", "leaves no interface"),
        ("NCCL_SOCKET_IFNAME", "=eth0", None),
        ("NCCL_SOCKET_IFNAME", "^docker", None),
        ("NCCL_SOCKET_IFNAME", "^eth,ib", "leaves no interface"),
        ("NCCL_SOCKET_IFNAME", "^=eth", None),
        ("NCCL_SOCKET_IFNAME", "lo", None),
    ],
)
def test_an_interface_that_is_asked_for_must_be_up_on_a_single_machine_too(
    facts, torch_with, monkeypatch, variable, value, problem
):
    facts(interfaces=ADDRESSES, host_address="10.0.0.3")
    torch_with(gpus=8)
    monkeypatch.setenv(variable, value)
    if problem is None:
        assert not list(network(1))
        assert only(network(2))[0] == GOOD
        return
    verdict, text = only(network(1))
    assert verdict == BAD
    assert text.startswith(f"{variable}={value} {problem}")
    assert text.endswith("unset it, or choose from eth0 (10.0.0.3), ib0 (10.1.0.3)")
    assert only(network(1, here=False))[0] == NOTE
    torch_with(gpus=0)  # where nobody uses NCCL
    on_nccl = variable.startswith("NCCL")
    assert only(network(1))[0] == (NOTE if on_nccl else BAD)
    facts(host_address="127.0.1.1")  # which the other variable does not mend
    assert [found.verdict for found in network(2)] == ([NOTE, BAD] if on_nccl else [BAD])


@pytest.mark.parametrize(
    ("cached", "offline", "reached", "verdict", "words"),
    [
        (True, False, True, GOOD, "in the hub cache"),
        (True, True, False, GOOD, "in the hub cache"),
        (True, False, False, NOTE, "set HF_HUB_OFFLINE=1, or the start waits"),
        (False, False, True, NOTE, "`hf auth login`"),
        (False, False, False, BAD, f"the hub does not answer; `hf download {HUB_ID}`"),
        (False, True, True, BAD, "HF_HUB_OFFLINE is set; `hf download"),
    ],
)
def test_weights_must_be_here_or_within_reach(facts, monkeypatch, cached, offline, reached, verdict, words):
    place = "/cache/config.json" if cached else None
    monkeypatch.setattr(machine_checks, "try_to_load_from_cache", lambda name, file: place)
    facts(is_offline=offline, reaches_hub=reached)
    found = backbone(HUB_ID)
    assert found.verdict == verdict
    assert words in found.text
    if verdict == BAD:  # another machine may have them
        assert backbone(HUB_ID, here=False).verdict == NOTE


def test_weights_in_a_folder_ask_nobody(facts, monkeypatch):
    monkeypatch.setattr(machine_facts, "reaches_hub", lambda: pytest.fail("asked"))
    assert backbone("scenes-tiny").verdict == GOOD


def test_doctor_counts_all_loaders_of_the_machine_against_its_shared_memory(facts, tmp_path):
    """Twelve views of 128 px for 16 photos, in two loaders of three workers with two batches each, in two processes."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {backbone: scenes-tiny, view_side: 128}\ndata: {workers: 3}\ntrain: {batch_size: 32}  # 16 for each\n"
    )
    facts(shared_memory=(2**20, 2**26))
    with pytest.raises(AuditFailed, match="shared") as caught:
        doctor(str(recipe), None, tmp_path, num_processes=2)
    found = {line["about"]: line for line in json.loads(caught.value.summary.read_text())["findings"]}
    views = 2 * 3 * 2 * 2 * 16 * 12 * 3 * 128**2
    said = float(found["shared"]["text"].partition(": ")[2].partition(" GiB")[0])
    assert views / GIB <= said <= 1.3 * views / GIB
    assert found["host"]["verdict"] == GOOD
    doctor(str(recipe), None, tmp_path, num_processes=2, gpu_gib=80.0)  # of a machine elsewhere nothing is known
    assert "shared" not in {line["about"] for line in json.loads((tmp_path / "summary.json").read_text())["findings"]}


def test_a_gpus_host_needs_room_for_the_backbone_of_each_process_and_for_one_copy_of_what_is_saved(monkeypatch):
    """The frozen backbone's weights in bf16, which all eight may read at once; activations are the GPU's."""
    config = read_config(find_recipe("cached_30ep"))
    config.data.workers = 0
    plan = checks.resolve(config, NODE, None, None, "bf16")
    assert str(plan) == "1 machine x 8 processes, by node_8.yaml and zero2.json"
    monkeypatch.setattr(checks, "uses_gpu", lambda: True)
    *_, found = checks.room(config, plan)
    parameters = count(config, vith16plus_config())
    backbones, saved = 8 * 2 * parameters.frozen, 16 * parameters.trained
    assert saved > 0.5 * GIB
    assert found.text.startswith(f"{(backbones + saved) / GIB:.1f} GiB of the host's memory for 8 processes")


def test_a_message_with_brackets_is_printed_as_it_is(capsys):
    """To the library of the table they are markup: some would be left out, others would end doctor with an error."""
    print_findings([Finding(BAD, "gpu", "[rank0] no kernel in [/usr/lib]")])
    assert "[rank0] no kernel in [/usr/lib]" in capsys.readouterr().err


def test_facts_are_read_from_the_system(tmp_path, monkeypatch):
    text = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version: 12.3\n"
    )
    (tmp_path / "version").write_text(text)
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(machine_facts, "DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(machine_facts, "DEVICES", tmp_path)
    monkeypatch.setattr(machine_facts, "SHARED_MEMORY", tmp_path)
    assert machine_facts.driver_version() == "535.183.01"
    assert machine_facts.gpus_of_the_system() == 3
    free, total = machine_facts.shared_memory()
    assert 0 < free <= total == psutil.disk_usage(str(tmp_path)).total
    monkeypatch.setattr(machine_facts, "DRIVER_VERSION", tmp_path / "none")
    monkeypatch.setattr(machine_facts, "SHARED_MEMORY", tmp_path / "none")
    assert machine_facts.driver_version() is None
    assert machine_facts.shared_memory() is None


def test_the_drivers_own_answer_is_read(monkeypatch):
    def ask(version):
        version._obj.value = 12040
        return 0

    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=ask))
    assert machine_facts.driver_cuda() == (12, 4)
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=lambda version: 100))
    assert machine_facts.driver_cuda() is None


def test_the_hub_or_the_proxy_before_it_is_asked_for_a_connection(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(machine_facts.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(machine_facts, "getproxies", dict)
        assert machine_facts.reaches_hub()
        monkeypatch.setattr(machine_facts, "getproxies", lambda: {"https": "http://127.0.0.1:9"})
        assert not machine_facts.reaches_hub()
    monkeypatch.setattr(machine_facts, "getproxies", dict)
    assert not machine_facts.reaches_hub()


def test_interfaces_are_those_that_are_up_without_the_loopback(monkeypatch):
    def address(family, text):
        return SimpleNamespace(family=family, address=text)

    found = {
        "lo": [address(socket.AF_INET, "127.0.0.1")],
        "eth0": [address(socket.AF_INET6, "fe80::1"), address(socket.AF_INET, "10.0.0.3")],
        "eth1": [address(socket.AF_INET, "10.0.1.3")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=name != "eth1") for name in found})
    assert machine_facts.interfaces() == {"eth0": "10.0.0.3"}
