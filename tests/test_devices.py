"""What is said where a GPU is there and Triton is not."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from tinysteer_kernels import devices

GPU = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))  # all that is asked of a tensor


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(devices, "HAS_TRITON", False)
    devices.capable.cache_clear()
    yield
    devices.capable.cache_clear()


def test_a_gpu_without_triton_is_told_of_once(without_triton):
    with pytest.warns(UserWarning, match=r'need Triton.* pip install "tinysteer\[gpu\]"') as told:
        assert [devices.serves(GPU) for _ in range(2)] == [False, False]
    assert len(told) == 1


def test_who_wants_no_kernel_hears_nothing(without_triton):
    with warnings.catch_warnings(), devices.use_kernels(False):
        warnings.simplefilter("error")
        assert not devices.serves(GPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not devices.serves(torch.zeros(1))


def test_a_gpu_before_ampere_takes_the_formula_and_is_told_of_once(monkeypatch):
    monkeypatch.setattr(devices, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    devices.capable.cache_clear()
    with pytest.warns(
        UserWarning, match=r"compute capability of 8.0, which Tesla T4 has not"
    ) as told:
        assert [devices.serves(GPU) for _ in range(2)] == [False, False]
    devices.capable.cache_clear()
    assert len(told) == 1
