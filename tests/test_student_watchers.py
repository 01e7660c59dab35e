"""TensorBoard and Weights & Biases, by modules that stand in for them: a resumed run goes on in the same curves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the student needs the train extra")

from selfinstruct.errors import EnvironmentFault
from selfinstruct.student.train.recipes import Runtime
from selfinstruct.student.train.watchers import watchers


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: object())


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    for attribute, value in contents.items():
        setattr(module, attribute, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_forgets_the_steps_that_are_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            shown.append((Path(folder).name, purge_step))

        def add_scalar(self, *what: Any) -> None:
            shown.append(what)

        def flush(self) -> None:
            pass

    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    (watch,) = watchers(tmp_path, Runtime(tensorboard=True))
    watch({"step": 0, "eval_loss": 3.0})
    watch({"step": 1, "loss": 2.0, "mfu": None})
    (again,) = watchers(tmp_path, Runtime(tensorboard=True))
    again({"step": 6, "loss": 1.0})
    assert shown == [
        ("tensorboard", 0), ("eval_loss", 3.0, 0), ("loss", 2.0, 1), ("tensorboard", 6), ("loss", 1.0, 6),
    ]  # fmt: skip


def test_weights_and_biases_go_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[Any, int]] = []

    def init(**how: Any) -> Any:
        begun.append(how)
        return SimpleNamespace(id=how.get("id", "abc123"), log=lambda what, step: logged.append((what, step)))

    stand_in(monkeypatch, "wandb", init=init)
    for step in (1, 2):
        (watch,) = watchers(tmp_path, Runtime(wandb=True))
        watch({"step": step, "loss": 1.0})
    assert "id" not in begun[0]
    assert (begun[1]["id"], begun[1]["resume"]) == ("abc123", "allow")
    assert logged == [({"loss": 1.0}, 1), ({"loss": 1.0}, 2)]


def test_a_service_without_a_login_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_how: Any) -> Any:
        raise LookupError("api_key not configured (no-tty)")

    stand_in(monkeypatch, "wandb", init=init)
    with pytest.raises(EnvironmentFault, match="api_key not configured") as caught:
        watchers(tmp_path, Runtime(wandb=True))
    assert "wandb login" in caught.value.hint
