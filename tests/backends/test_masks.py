"""Who applies the dropout mask to ATen's tensors; `test_gpu_masks.py` has the kernel on a GPU, the
interpreter's cases what it computes."""

import contextlib
import warnings

import pytest
import torch

from lora_kernels.backends import masks
from lora_kernels.backends.dropout import keep_mask

SEED, P = torch.tensor([77]), 0.3
CUDA = torch.device("cuda", 0)


def test_atens_mask():
    x, term, total = torch.randn(3, 40, 72).unbind()
    keep = keep_mask(SEED, 5, 40, 72, P)
    mask = masks.mask(SEED, 5, 40, 72, P)
    assert type(mask) is masks.Mask
    assert torch.equal(mask.drop(x), x * keep)
    expected = total.clone()
    expected[:, 8:24] += 2 * (term * keep)[:, 8:24]
    mask.add_kept(total[:, 8:24], term[:, 8:24].clone(), 2.0, slice(8, 24))
    assert torch.equal(total, expected)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As far as who is asked goes: `deviation` is told what the kernel says."""
    masking = pytest.importorskip("lora_kernels.backends.triton.masking")
    monkeypatch.setattr(masks, "_right", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked = []

    def says(answer):
        def deviation(device):
            asked.append(device)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(masking, "deviation", deviation)
        return asked

    return says


def test_a_right_kernel_is_asked_once(on_a_gpu):
    asked = on_a_gpu(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert masks._vouched(CUDA)
        assert masks._vouched(CUDA)
    assert asked == [CUDA]


@pytest.mark.parametrize(
    ("answer", "words"),
    [("it computes another mask", "another mask"), (RuntimeError("no ptxas\nat all"), "no ptxas")],
)
def test_a_wrong_kernel_leaves_the_mask_to_aten_and_says_so(on_a_gpu, answer, words):
    asked = on_a_gpu(answer)
    with pytest.warns(RuntimeWarning, match=f"dropout on cuda:0 takes ATen's.*{words}") as caught:
        assert not masks._vouched(CUDA)
    assert not masks._vouched(CUDA)
    assert len(caught) == len(asked) == 1


def test_no_kernel_is_tried_while_a_graph_is_captured(on_a_gpu, monkeypatch):
    asked = on_a_gpu(None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not masks._vouched(CUDA)
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert masks._vouched(CUDA)
