"""Targets: where values come from, JSON, the hash, and mistakes of published tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm42c.codegen import device
from llm42c.codegen.cpu import device as cpus
from llm42c.codegen.cpu import target as cpu_target
from llm42c.codegen.device import MEASURED, Device, UnknownDeviceError, Value
from llm42c.codegen.triton import devices


def test_json_round_trip_keeps_every_value_and_its_source():
    a = devices.from_table("NVIDIA H200")
    b = Device.from_json(a.to_json())
    assert b == a
    assert b.hash == a.hash
    assert all(v.source for v in b.values.values())


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("NVIDIA L4", "memory_bandwidth", 300e9),
        ("NVIDIA L4", "bf16_flops", 121e12),  # dense
        ("NVIDIA H200", "memory_bandwidth", 4800e9),
        ("NVIDIA H200 NVL", "memory_bandwidth", 4800e9),  # by pattern
        ("NVIDIA H100 80GB HBM3", "link_bandwidth", 450e9),  # one direction
        ("NVIDIA A100-SXM4-40GB", "memory_bandwidth", 1555e9),
    ],
)
def test_table_avoids_known_mistakes(name: str, key: str, expected: float):
    assert devices.from_table(name).get(key) == expected


def test_an_exact_name_is_no_prefix_match():
    assert devices.lookup("NVIDIA L4").pattern == "NVIDIA L4"
    assert devices.lookup("NVIDIA L40S").pattern == "NVIDIA L40S"
    assert devices.lookup("NVIDIA L400") is None


def test_ridge_points_match_independent_figures():
    """Tokens at which bf16 weights turn from bandwidth to compute: FLOP/s over B/s."""
    for name, tokens in (
        ("NVIDIA A100-SXM4-80GB", 153),
        ("NVIDIA H200", 206),
        ("NVIDIA H100 80GB HBM3", 295),
    ):
        target = devices.from_table(name)
        assert round(target.get("bf16_flops") / target.get("memory_bandwidth")) == pytest.approx(
            tokens, abs=1
        )


def test_hash_ignores_bandwidths_and_nothing_else():
    a = devices.from_table("NVIDIA H200")
    assert a.measured({"memory_bandwidth": Value(4e12, "measured: copy")}).hash == a.hash
    assert a.measured({"sms": Value(131, "driver")}).hash != a.hash


def test_mistakes_have_names():
    with pytest.raises(UnknownDeviceError, match="no device called"):
        devices.from_table("NVIDIA Z9")
    with pytest.raises(UnknownDeviceError, match="is not known"):
        devices.from_table("NVIDIA H200").get("memory_bytes")
    with pytest.raises(UnknownDeviceError, match="unknown values"):
        Device("cuda", "x", "sm_90", {"speed": Value(1, "me")})
    with pytest.raises(UnknownDeviceError, match="positive"):
        Device("cuda", "x", "sm_90", {"sms": Value(0, "me")})
    with pytest.raises(UnknownDeviceError, match="not the JSON"):
        Device.from_json("{}")


def test_this_cpu_is_detected_and_measured_once(tmp_path: Path):
    found = cpus.detect()
    assert found.get("cores") >= 1
    path = tmp_path / "cpu.json"
    first = device.measure(found, cpus.rates, path)
    stamp = path.stat().st_mtime_ns
    second = device.measure(found, cpus.rates, path)
    assert second == first
    assert path.stat().st_mtime_ns == stamp
    assert first.values["memory_bandwidth"].source.startswith("measured")
    assert first.get("memory_bandwidth") >= first.get("bandwidth_per_core") > 0


@pytest.mark.parametrize(
    "content", ["", "{", "{}", '{"kind": "cpu", "name": "x", "arch": "y", "values": {"sms": {}}}']
)
def test_a_damaged_measurement_is_made_again(content: str, tmp_path: Path):
    found, path = cpus.detect(), tmp_path / "cpu.json"
    path.write_text(content)
    first = device.measure(found, lambda: {"memory_bandwidth": Value(1e9, MEASURED)}, path)
    assert Device.from_json(path.read_text()) == first


def test_a_measurement_that_cannot_be_kept_lasts_as_long_as_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def measured() -> dict[str, Value]:
        calls.append(1)
        return {
            "memory_bandwidth": Value(1e9, MEASURED),
            "bandwidth_per_core": Value(5e8, MEASURED),
        }

    monkeypatch.setattr(cpus, "rates", measured)
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    workers = cpu_target.filling_the_memory.__wrapped__  # which asks once
    assert workers() == workers() == 2
    assert calls == [1]


@pytest.mark.parametrize(("total", "core", "workers"), [(34e9, 20e9, 1), (200e9, 12e9, 16), (10e9, 12e9, 1)])
def test_decode_workers_are_the_cores_that_fill_the_memory(total: float, core: float, workers: int):
    values = {"memory_bandwidth": Value(total, "measured"), "bandwidth_per_core": Value(core, "measured")}
    assert cpus.decode_workers(Device("cpu", "some", "x86_64", values)) == workers


def test_decode_workers_need_bandwidths():
    with pytest.raises(UnknownDeviceError, match="memory_bandwidth is not known"):
        cpus.decode_workers(Device("cpu", "some", "x86_64"))
