"""What a machine is and what of it limits the product."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from hwmodels.machine import Machine, cache_bytes, differences, findings, fingerprint, memory_modules, read_machine

GOOD = Machine(
    cpu="Made Up 9000",
    isa=("AVX2", "AVX512", "AVX512_BF16"),
    n_cores=16,
    n_threads=32,
    n_online=32,
    n_numa_nodes=1,
    ram_bytes=64 * 2**30,
    free_bytes=60 * 2**30,
    memlock_bytes=None,
    load=0.5,
    kernel="Linux 6.1",
    python="3.11.1",
)


def test_this_machine_can_be_read():
    here = read_machine()
    assert 1 <= here.n_cores <= here.n_threads
    assert 0 < here.free_bytes <= here.ram_bytes
    assert all(isinstance(value, str) and value for value in fingerprint().values())


def test_a_cache_that_cores_share_counts_once(tmp_path: Path):
    assert cache_bytes(tmp_path) == 0
    cpus = sorted(os.sched_getaffinity(0))
    for cpu in cpus:
        shared = ",".join(map(str, cpus))
        for index, (level, size, sharers) in enumerate(
            [("1", "48K", cpu), ("2", "2048K", cpu), ("3", "32768K", shared)]
        ):
            folder = tmp_path / f"cpu{cpu}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", sharers)):
                (folder / name).write_text(f"{text}\n", encoding="ascii")
    assert cache_bytes(tmp_path) == 32 << 20


def test_a_machine_is_no_different_from_itself():
    assert differences(fingerprint(), fingerprint()) == []


def test_a_good_machine_has_nothing_to_find():
    assert findings(GOOD) == []


@pytest.mark.parametrize(
    ("change", "name", "fix"),
    [
        ({"memlock_bytes": 8 * 2**20}, "memlock", "ulimit -l unlimited"),
        ({"ram_bytes": 8 * 2**30, "free_bytes": 8 * 2**30}, "ram", "add memory"),
        ({"free_bytes": 2**30}, "ram", "Close what holds the rest"),
        ({"modules": (1, 2)}, "channels", "into every channel"),
        ({"modules": (3, 16)}, "channels", "into every channel"),
        ({"load": 20.0}, "load", "Stop them before calibrating"),
        ({"n_threads": 16}, "affinity", "taskset -c"),
        ({"n_cores": 2}, "cores", "4 cores or more"),
        ({"isa": ("AVX2",)}, "bf16", "--dtype float32"),
        ({"isa": ("AVX512_BF16",)}, "simd", "AVX2 or NEON"),
        ({"n_numa_nodes": 2}, "numa", "numactl"),
    ],
)
def test_every_limit_is_found_alone_and_comes_with_its_fix(change, name, fix):
    found = findings(replace(GOOD, **change))
    assert [f.name for f in found] == [name]
    assert fix in found[0].fix
    assert str(found[0]) == f"{found[0].limit}. {found[0].fix}."


@pytest.mark.parametrize("modules", [None, (1, 1), (2, 2), (2, 4), (8, 16)])
def test_a_module_in_every_channel_or_an_unknown_number_is_no_finding(modules):
    assert findings(replace(GOOD, modules=modules)) == []


def test_udev_tells_modules_and_slots_or_nothing():
    sizes = "E:MEMORY_ARRAY_NUM_DEVICES=4\nE:MEMORY_DEVICE_0_PRESENT=0\nE:MEMORY_DEVICE_1_SIZE=17179869184\n"
    assert memory_modules(sizes + "E:MEMORY_DEVICE_1_LOCATOR=DIMM A2\nE:MEMORY_DEVICE_2_PRESENT=0\n") == (1, 3)
    assert memory_modules("E:ID_VENDOR=QEMU\n") is None


def test_a_limit_says_the_number_that_was_found():
    assert "8.00 MiB" in findings(replace(GOOD, memlock_bytes=8 * 2**20))[0].limit


def test_a_changed_kernel_or_lock_limit_does_not_make_another_machine():
    assert differences(fingerprint(GOOD), fingerprint(replace(GOOD, kernel="Linux 7", memlock_bytes=1))) == []


def test_another_cpu_or_gpu_does():
    one = {**fingerprint(GOOD), "gpu": "RTX 4090"}
    other = {**fingerprint(replace(GOOD, cpu="Other 1")), "gpu": "T4"}
    assert differences(one, other) == ["cpu: Made Up 9000 there, Other 1 here", "gpu: RTX 4090 there, T4 here"]


def test_what_only_one_side_knows_tells_nothing():
    assert differences({"cpu": "a", "gpu": "T4"}, {"cpu": "a"}) == []
