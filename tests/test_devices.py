"""The known devices, found by name."""

import pytest

from hut_kernels import devices
from hut_kernels.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_devices_are_found_by_name_part_and_case(device):
    assert devices.find_device(device.name) == device
    assert devices.find_device(device.name.split()[-1].lower()) == device
    assert devices.find_device(device.name.replace(" ", "").upper()) == device
    assert devices.find_device(device.arch).arch == device.arch
    assert device.arch in devices.BREAK_EVENS


def test_an_unknown_device_lists_the_known():
    assert devices.find_device("CPU") == devices.CPU
    with pytest.raises(ValueError, match=r"'TPU v5'.*known: cpu.*A100.*RTX 5090"):
        devices.find_device("TPU v5")
    with pytest.raises(ValueError, match=r"'A10'.*known: cpu.*A100"):
        devices.find_device("A10")  # is no A100


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_a_device(name):
    with pytest.raises(ValueError, match="known: cpu"):
        devices.find_device(name)


@pytest.mark.parametrize(
    ("given", "known"),
    [("NVIDIA H100 80GB HBM3", "NVIDIA H100"), ("NVIDIA A100-SXM4-80GB", "NVIDIA A100")],
)
def test_a_device_is_known_by_its_drivers_name(given, known):
    assert devices.find_device(given).name == known
