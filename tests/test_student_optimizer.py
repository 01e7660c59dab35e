# ruff: noqa: E402 - the packages are looked for first
"""The update equals AdamW on fp32 masters, whatever the weights and moments are kept in."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the student needs the train extra")
pytest.importorskip("transformers", reason="the student needs the train extra")

from student_tiny import tiny_model

from selfinstruct.student.train import adapters, attention
from selfinstruct.student.train.optimizer import AdamSettings, SplitAdamW
from selfinstruct.student.train.recipes import Recipe
from selfinstruct.student.train.rounding import join_halves, narrow, noise, split_halves, widen
from selfinstruct.student.train.tokens import from_rows
from selfinstruct.student.train.trainee import Trainee, load_model
from selfinstruct.student.train.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("default")


def run(state: str, steps: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(start, our masters, AdamW's fp32 weights) after some steps on the same gradients."""
    torch.manual_seed(3)
    start = torch.randn(64, 128).bfloat16()
    ours, reference = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    adam = SplitAdamW(iter([("w", ours)]), AdamSettings(state=state, weight_decay=0.1, max_norm=0.0))
    wanted = torch.optim.AdamW([reference], lr=1e-4, weight_decay=0.1)
    direction = torch.randn(64, 128)
    for _ in range(steps):
        grad = (direction + torch.randn(64, 128)).bfloat16() * 1e-3
        ours.grad, reference.grad = grad.clone(), grad.float()
        adam.step(1e-4, torch.ones(()))
        wanted.step()
    master = join_halves(ours.detach().view(torch.int16).view(-1), adam.state_tensors()["w/low"])
    return start.float().view(-1), master, reference.detach().view(-1)


def test_updates_of_split_weights_are_exactly_those_of_fp32_masters() -> None:
    start, master, reference = run("fp32")
    assert (master - reference).abs().max() < 2e-7 * start.abs().max() * 4
    # At this rate most steps are far below a bfloat16 step: without the low halves nothing would have moved.
    assert (master - start).abs().mean() > 1e-3


@pytest.mark.parametrize(("state", "most"), [("bf16", 0.02), ("8bit", 0.06)])
def test_small_moments_follow_the_exact_ones(state: str, most: float) -> None:
    start, master, reference = run(state)
    gone = (reference - start).abs().mean()
    assert (master - reference).abs().mean() / gone < most
    # Unbiased: the errors cancel over the parameters.
    assert (master - reference).mean().abs() / gone < most / 10


def test_halves_join_to_the_same_bits() -> None:
    torch.manual_seed(0)
    numbers = torch.cat([torch.randn(1000) * 10.0**p for p in range(-20, 20, 4)] + [torch.tensor([0.0, -0.0, 1.5])])
    high, low = split_halves(numbers)
    assert torch.equal(join_halves(high, low).view(torch.int32), numbers.view(torch.int32))
    # Halves are rounded away from zero where PyTorch rounds to even; all else is the nearest bfloat16.
    nearest = high.view(torch.bfloat16).float()
    assert torch.all((nearest - numbers).abs() <= (numbers.bfloat16().float() - numbers).abs())


def test_stochastic_rounding_has_no_bias_and_repeats() -> None:
    value = torch.full((200_000,), 1.0 + 0.3 / 128)  # 30 % of the way between two bfloat16 numbers
    dither = noise(0, value, torch.tensor(12345, dtype=torch.int32))
    rounded = widen(narrow(value, dither))
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    assert rounded.mean().item() == pytest.approx(value[0].item(), abs=3e-5)
    assert torch.equal(dither, noise(0, value, torch.tensor(12345, dtype=torch.int32)))
    assert not torch.equal(dither, noise(0, value, torch.tensor(12346, dtype=torch.int32)))


def test_a_second_moment_keeps_moving_in_bf16() -> None:
    parameter = torch.nn.Parameter(torch.zeros(64, 128).bfloat16())
    adam = SplitAdamW(iter([("w", parameter)]), AdamSettings(state="bf16", max_norm=0.0))
    for _ in range(400):
        parameter.grad = torch.ones_like(parameter)
        adam.step(0.0, torch.ones(()))
    v = widen(adam.state_tensors()["w/v"])
    assert v.mean().item() == pytest.approx(1 - 0.999**400, rel=0.02)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="gradients have the dtype of weights before 2.10")
def test_gradients_of_adapters_add_up_in_32_bits(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    sdpa = attention.Choice("sdpa", "asked for")
    folder = str(tiny_model(tmp_path))
    model = load_model(folder, dtype=torch.bfloat16, kernel=sdpa, device=torch.device("cpu"))
    adapters.add(model, Recipe("test", method="lora", lora_rank=4), folder)
    trainee = Trainee(model)
    optimizer = SplitAdamW(trainee.named_trained(), AdamSettings())
    tokens = from_rows(
        [[1, *range(number + 3, number + 60), 2] for number in range(64)], [1] * 64, eos=2, max_length=99
    )
    trainer = Trainer(trainee, optimizer, tokens, Recipe("test", batch=64), steps=1, budget=64)
    rows, sums = list(range(64)), dict.fromkeys(optimizer.parameters, torch.zeros(()))
    for batch in trainer.micro_batches(rows):
        trainee(batch, 64 * 58).backward()
        for name, parameter in optimizer.parameters.items():
            sums[name] = sums[name] + parameter.grad.double()
        optimizer.zero_grad()
    trainer.backward(rows, 64 * 58)
    for name, parameter in optimizer.parameters.items():
        torch.testing.assert_close(parameter.grad.double(), sums[name].double(), rtol=1e-4, atol=1e-9)


def three(
    state: str, dtype: torch.dtype, *, loud: float = 1.0, only: str = "", resumed: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(weights, state) of three parameters, or of ``only`` one of them, after steps that leave out b twice.

    ``loud``: what the gradients of a and c are multiplied with. ``resumed``: half way, all goes on in new tensors.
    """
    draw = torch.Generator().manual_seed(11)
    sizes = {"a": (64, 64), "frozen": (5,), "b": (17, 256), "c": (32, 160)}
    known = {name: torch.nn.Parameter(torch.randn(size, generator=draw).to(dtype)) for name, size in sizes.items()}
    known["frozen"].requires_grad_(False)

    def new() -> SplitAdamW:
        named = ((name, p) for name, p in known.items() if only in ("", name))
        return SplitAdamW(named, AdamSettings(state=state, weight_decay=0.1, max_norm=0.0))

    adam = new()
    for step in range(6):
        for name, parameter in known.items():
            grad = torch.randn(parameter.shape, generator=draw) * (1.0 if name == "b" else loud)
            if parameter.requires_grad and not (name == "b" and step in (1, 4)):
                parameter.grad = grad.to(dtype)
        adam.step(1e-2, torch.ones(()))
        for parameter in known.values():
            parameter.grad = None
        if resumed and step == 2:
            kept, steps = {name: t.clone() for name, t in adam.state_tensors().items()}, adam.steps
            adam = new()
            adam.steps = steps
            for name, tensor in adam.state_tensors().items():
                tensor.copy_(kept[name])
    return {name: p.detach().clone() for name, p in known.items()}, adam.state_tensors()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_updated_together_end_as_if_updated_alone(dtype: torch.dtype) -> None:
    together, state = three("fp32", dtype)
    for name in ("a", "b", "c"):
        alone, own = three("fp32", dtype, only=name)
        assert torch.equal(together[name], alone[name])
        assert all(torch.equal(state[slot], tensor) for slot, tensor in own.items())


@pytest.mark.parametrize("kind", ["fp32", "bf16", "8bit"])
def test_parameters_updated_together_leave_each_other_alone(kind: str) -> None:
    quiet, quiet_state = three(kind, torch.bfloat16)
    loud, loud_state = three(kind, torch.bfloat16, loud=1000.0)
    assert torch.equal(quiet["b"], loud["b"])
    own = [slot for slot in quiet_state if slot.startswith("b/")]
    assert own
    assert all(torch.equal(quiet_state[slot], loud_state[slot]) for slot in own)
    resumed, resumed_state = three(kind, torch.bfloat16, resumed=True)
    assert all(torch.equal(quiet[name], resumed[name]) for name in quiet)
    assert all(torch.equal(quiet_state[slot], resumed_state[slot]) for slot in quiet_state)


def test_clipping_goes_by_the_global_norm() -> None:
    two = {"a": torch.nn.Parameter(torch.zeros(3)), "b": torch.nn.Parameter(torch.zeros(4).bfloat16())}
    two["a"].grad, two["b"].grad = torch.full((3,), 2.0), torch.full((4,), -1.0).bfloat16()
    assert SplitAdamW(iter(two.items()), AdamSettings()).squares().sqrt().item() == pytest.approx(4.0)
    parameter = torch.nn.Parameter(torch.zeros(4))
    adam = SplitAdamW(iter([("w", parameter)]), AdamSettings(max_norm=1.0))
    parameter.grad = torch.full((4,), 5.0)
    adam.step(0.1, torch.tensor(10.0))
    assert adam.state_tensors()["w/m"].tolist() == pytest.approx([0.05] * 4)
